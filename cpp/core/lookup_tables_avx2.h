// SPDX-License-Identifier: Apache-2.0
// Tables of sums for products of floats with sign bits: for every 2 columns of a row of activations the 4 sums +-a0
// +-a1 in both halves of a register, which vpermilps looks up by 2 bits of the weight for 8 outputs at once. Two
// lookups and two additions are 32 products; shuffles and additions run on different units, so that is 32 products a
// cycle where both have two units (Zen 3), twice what multiplications and additions reach.
#pragma once

#include <algorithm>

#include "avx2.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

inline constexpr int64_t kFourFloats = 8;                // of the two tables of 4 columns
inline constexpr int64_t kWordFloats = 8 * kFourFloats;  // of the tables of a word of 32 columns

// The tables of one activation row, [words][8][2][4] floats; the bit of the first column of a pair is the lower one.
// Columns past k are 0; what their bits select adds 0 to a sum that is never -0. The tables of 4 columns lie
// `rows` x kFourFloats apart, so that those of several rows can lie side by side.
template <class T>
static void build_tables(const T* x, int64_t k, int64_t rows, float* tables) {
  const __m256 first = _mm256_setr_ps(-0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f);
  const __m256 second = _mm256_setr_ps(-0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f);
  const __m256i even = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2), odd = _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3);
  const auto put = [&](__m256 four) {
    const __m256 left = _mm256_xor_ps(_mm256_permutevar_ps(four, even), first);
    const __m256 right = _mm256_xor_ps(_mm256_permutevar_ps(four, odd), second);
    _mm256_store_ps(tables, _mm256_add_ps(left, right));
    tables += rows * kFourFloats;
  };
  const auto put8 = [&](const T* from) {
    const __m256 eight = load8(from);
    put(_mm256_permute2f128_ps(eight, eight, 0x00));
    put(_mm256_permute2f128_ps(eight, eight, 0x11));
  };
  int64_t column = 0;
  for (; column + 8 <= k; column += 8) put8(x + column);
  T rest[32] = {};
  std::copy(x + column, x + k, rest);
  for (const T* from = rest; column < word_count(k) * 32; column += 8, from += 8) put8(from);
}

// Adds what the lowest 2 bits of `bits` and of `next` select: 4 columns.
[[gnu::always_inline]] static inline void look_up(__m256& sum, __m256i bits, __m256 table, __m256i next,
                                                  __m256 next_table) {
  const __m256 left = _mm256_permutevar_ps(table, bits), right = _mm256_permutevar_ps(next_table, next);
  sum = _mm256_add_ps(sum, _mm256_add_ps(left, right));
  settle(sum);  // lookups and sum stay together; otherwise registers run out
}

}  // namespace
}  // namespace bitmill::detail
