// SPDX-License-Identifier: Apache-2.0
// What the ops of packed bits ask of their arguments, beyond checks.h.
#pragma once

#include <string>

#include "bitpack.h"
#include "checks.h"
#include "layout.h"

namespace bitmill {

inline constexpr const char* kPackRemedy = "; pack the weight with bitmill.ops.tile_pack";

inline Levels levels_of(const char* op, const std::string& levels) {
  if (levels == "sign") return Levels::sign;
  if (levels == "plus") return Levels::plus;
  if (levels == "bool") return Levels::bool_;
  fail(op, ": levels must be \"sign\", \"plus\" or \"bool\", got \"", levels, "\"");
}

// The kernels count whole words, so bits past k must be 0. `count` last words lie `stride` words apart.
inline void check_padding(const char* op, const char* name, const int32_t* last, int64_t count, int64_t stride,
                          int64_t k) {
  if (k % 32 == 0) return;
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint32_t>(last[i * stride]);
  if (bits >> (k % 32)) fail(op, ": the bits of ", name, " past column k = ", k, " must be 0, got 1; pack it again");
}

inline void check_row_padding(const char* op, const char* name, const Tensor& rows, int64_t m, int64_t k) {
  check_padding(op, name, data<int32_t>(rows) + word_count(k) - 1, m, word_count(k), k);
}

inline void check_tile_padding(const char* op, const char* name, const Tensor& tiles, int64_t n, int64_t k) {
  for (int64_t tile = 0; k > 0 && tile < tile_count(n); ++tile) {
    const int32_t* last = data<int32_t>(tiles) + ((tile + 1) * word_count(k) - 1) * kTileRows;
    check_padding(op, name, last, kTileRows, 1, k);
  }
}

}  // namespace bitmill
