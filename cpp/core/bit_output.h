// SPDX-License-Identifier: Apache-2.0
// Integers as packed rows: 16 outputs of a tile are half a word, so tiles never share a byte and threads never share a
// write.
#pragma once

#include <cstring>

#include "binary_matmul.h"
#include "layout.h"

namespace bitmill::detail {

// Half a word of a row of n columns: the columns of `tile`.
static inline void store_half_word(int32_t* plane, int64_t n, int64_t row, int64_t tile, uint16_t bits) {
  char* const to = reinterpret_cast<char*>(plane + row * word_count(n)) + 2 * tile;
  std::memcpy(to, &bits, sizeof bits);
  const bool last_half = tile % 2 == 0 && tile + 1 == tile_count(n);  // the other half of this word is past n
  if (last_half) std::memset(to + 2, 0, 2);
}

static constexpr bool in_range(int32_t first, int32_t last, int32_t dot) {
  const auto from_first = [&](int32_t x) { return static_cast<uint32_t>(x) - static_cast<uint32_t>(first); };
  return from_first(dot) <= from_first(last);
}

// The lanes of `zeros`, outputs of a tile, whose dot product is among those that are negative one by one.
static inline uint32_t single_negatives(const BitOutput& out, int64_t tile, const int32_t* dot, uint32_t zeros) {
  uint32_t found = 0;
  for (; zeros; zeros &= zeros - 1) {
    const int lane = __builtin_ctz(zeros);
    const int32_t* single = out.single + (tile * kTileRows + lane) * out.single_count;
    for (int64_t i = 0; i < out.single_count; ++i) found |= static_cast<uint32_t>(single[i] == dot[lane]) << lane;
  }
  return found;
}

// The lanes of up to 16 outputs, from `column` of n, whose dot product is in their range.
static inline uint32_t inside_range(const int32_t* range, int64_t n, int64_t column, const int32_t* dot,
                                    int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* first = range + column + i;
    found |= static_cast<uint32_t>(in_range(first[0], first[n], dot[i])) << i;
  }
  return found;
}

// The bits of up to 16 outputs of a row of n from their dot products. `inside` does what inside_range does.
template <class Inside>
static inline void store_bits(const BitOutput& out, int64_t n, int64_t row, int64_t tile, const int32_t* dot,
                              int64_t count, const Inside& inside) {
  const int64_t column = tile * kTileRows;
  const uint32_t sign = inside(out.positive, n, column, dot, count);
  uint32_t nonzero = out.nonzero ? sign | inside(out.negative, n, column, dot, count) : 0;
  store_half_word(out.sign, n, row, tile, static_cast<uint16_t>(sign));
  if (out.single) nonzero |= single_negatives(out, tile, dot, ~nonzero & ((1u << count) - 1));
  if (out.nonzero) store_half_word(out.nonzero, n, row, tile, static_cast<uint16_t>(nonzero));
}

}  // namespace bitmill::detail
