// SPDX-License-Identifier: Apache-2.0
// Results of a binary product as packed rows: 16 outputs of a tile are half a word, so tiles never share a byte and
// threads never share a write.
#pragma once

#include <cstring>

#include "binary_matmul.h"
#include "layout.h"

namespace bitmill::detail {

static inline void store_half_word(int32_t* plane, const BinaryMatmulParams& p, int64_t row, int64_t tile,
                                   uint16_t bits) {
  char* const to = reinterpret_cast<char*>(plane + row * word_count(p.n)) + 2 * tile;
  std::memcpy(to, &bits, sizeof bits);
  const bool last_half = tile % 2 == 0 && tile + 1 == tile_count(p.n);  // the other half of this word is past n
  if (last_half) std::memset(to + 2, 0, 2);
}

// The bits of up to 16 outputs from their dot products.
static inline void store_bits(const BinaryMatmulParams& p, int64_t row, int64_t tile, const int32_t* dot,
                              int64_t count) {
  uint32_t sign = 0, nonzero = 0;
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t column = tile * kTileRows + lane;
    const auto inside = [&](const int32_t* range) {
      return range[column] <= dot[lane] && dot[lane] <= range[p.n + column];
    };
    sign |= static_cast<uint32_t>(inside(p.bits.positive)) << lane;
    if (p.bits.nonzero) nonzero |= static_cast<uint32_t>(!inside(p.bits.zero)) << lane;
  }
  store_half_word(p.bits.sign, p, row, tile, static_cast<uint16_t>(sign));
  if (p.bits.nonzero) store_half_word(p.bits.nonzero, p, row, tile, static_cast<uint16_t>(nonzero));
}

}  // namespace bitmill::detail
