// SPDX-License-Identifier: Apache-2.0
// Tables of sums for products of floats with sign bits: for every 4 columns of a row of activations the 16 sums
// +-a0 +-a1 +-a2 +-a3 in one register, which vpermps looks up by 4 bits of the weight for 16 outputs at once.
#pragma once

#include "avx512.h"
#include "layout.h"

namespace bitmill::detail {

inline constexpr int64_t kTables = 8;                  // tables a word of 32 columns
inline constexpr int64_t kTableFloats = 16 * kTables;  // floats of tables a word

// Where the 4 sums of a table's pair of columns lie, for bits 00, 01, 10, 11 (the first column's bit is the lower one):
// lane i of the sums a0 + a1, lane 8 + i of the differences a0 - a1; 16 more for the negatives.
struct PairIndex {
  alignas(64) int32_t low[16], high[16];  // by the lower and the upper two bits of a table's index

  PairIndex() {
    constexpr int kLane[4] = {16, 8, 24, 0};
    for (int i = 0; i < 16; ++i) low[i] = kLane[i & 3], high[i] = kLane[i >> 2] + 1;
  }
};

// The tables of one activation row, [words][8][16] floats: ((+-a0 +- a1) + (+-a2 +- a3)). Columns past k are 0; what
// their bits select adds 0 to a sum that is never -0.
template <class T>
static void build_tables(const T* x, int64_t k, float* tables) {
  const PairIndex index;
  const __m512i low = _mm512_load_si512(index.low), high = _mm512_load_si512(index.high);
  const __m512i even_odd = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  const int64_t end = word_count(k) * 32;
  for (int64_t column = 0; column < end; column += 16) {
    const __m512 a = _mm512_permutexvar_ps(even_odd, load16(x + column, first_lanes(k - column)));
    const __m512 even = _mm512_shuffle_f32x4(a, a, 0x44), odd = _mm512_shuffle_f32x4(a, a, 0xEE);
    const __m512 pairs = _mm512_mask_sub_ps(_mm512_add_ps(even, odd), __mmask16{0xFF00}, even, odd);
    const __m512 negatives = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(pairs), sign));
    for (int table = 0; table < 4; ++table) {
      const __m512i first = _mm512_set1_epi32(2 * table);
      const __m512 lower = _mm512_permutex2var_ps(pairs, _mm512_add_epi32(low, first), negatives);
      const __m512 upper = _mm512_permutex2var_ps(pairs, _mm512_add_epi32(high, first), negatives);
      _mm512_store_ps(tables + 4 * column + 16 * table, _mm512_add_ps(lower, upper));
    }
  }
}

}  // namespace bitmill::detail
