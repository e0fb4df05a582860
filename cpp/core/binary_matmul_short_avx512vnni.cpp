// SPDX-License-Identifier: Apache-2.0
// Dot products of signs of one or two words, such as an attention's scores, where n is no multiple of 16. Rows of
// results begin anywhere between two lines, a vector across two lines is written twice, and with so few words writing
// is much of the work. So vectors begin where lines do: rows whose results lie alike towards the lines are taken
// together, with the weights of their vectors in registers. Only the first and the last vector of a row lie across
// lines, and overlap others. And k - 2 sum is one instruction.
#include <numeric>

#include "avx512.h"
#include "binary_matmul.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int kVectors = 7;  // side by side: two words of each are in registers

// Results of `vectors` x 16 columns, from column[v] on, for every `step`-th row. weight: [words][n].
template <int words, int vectors>
void short_rows(const BinaryMatmulParams& p, const int32_t* weight, const int64_t* column, int64_t row, int64_t step) {
  const __m512i columns = _mm512_set1_epi32(static_cast<int32_t>(p.k));
  const __m512i minus_two = _mm512_set1_epi32(0xFFFE);  // the lower half: a sum is at most 64
  __m512i first[vectors], second[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    first[v] = _mm512_loadu_si512(weight + column[v]);
    second[v] = _mm512_loadu_si512(weight + (words - 1) * p.n + column[v]);
  }
  for (; row < p.m; row += step) {
    const __m512i a0 = _mm512_set1_epi32(p.a[row * words]), a1 = _mm512_set1_epi32(p.a[row * words + words - 1]);
    int32_t* const out = p.dot + row * p.n;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      __m512i sum = _mm512_popcnt_epi32(_mm512_xor_si512(a0, first[v]));
      if constexpr (words == 2) sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_xor_si512(a1, second[v])));
      _mm512_storeu_si512(out + column[v], _mm512_dpwssd_epi32(columns, sum, minus_two));
    }
  }
}

// The same for `count` <= `vectors` vectors.
template <int words, int vectors>
void some_vectors(const BinaryMatmulParams& p, const int32_t* weight, const int64_t* column, int64_t count, int64_t row,
                  int64_t step) {
  if (count == vectors) return short_rows<words, vectors>(p, weight, column, row, step);
  if constexpr (vectors > 1) some_vectors<words, vectors - 1>(p, weight, column, count, row, step);
}

template <int words>
void short_product(const BinaryMatmulParams& p) {
  const Scratch<int32_t> weight(words * p.n + kTileRows);
  for (int64_t tile = 0; tile < tile_count(p.n); ++tile) {
    const __mmask16 lanes = first_lanes(p.n - tile * kTileRows);
    for (int word = 0; word < words; ++word) {
      const __m512i bits = _mm512_loadu_si512(p.weight + (tile * words + word) * kTileRows);
      _mm512_mask_storeu_epi32(weight + word * p.n + tile * kTileRows, lanes, bits);
    }
  }
  const Scratch<int64_t> column(p.n / kTileRows + 2);
  const int64_t step = kTileRows / std::gcd(kTileRows, p.n);  // from a row to the next that lies alike
  for (int64_t row = 0; row < step && row < p.m; ++row) {
    const auto begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.dot + row * p.n) / sizeof(int32_t));
    int64_t count = 0, at = (kTileRows - begin % kTileRows) % kTileRows;
    if (at > 0) column[count++] = 0;
    for (; at + kTileRows <= p.n; at += kTileRows) column[count++] = at;
    if (at < p.n) column[count++] = p.n - kTileRows;
    for (int64_t v = 0; v < count; v += kVectors) {
      const int64_t left = count - v;
      some_vectors<words, kVectors>(p, weight, column + v, left < kVectors ? left : kVectors, row, step);
    }
  }
}

}  // namespace

void binary_matmul_short_avx512vnni(const BinaryMatmulParams& p) {
  if (word_count(p.k) == 1) return short_product<1>(p);
  short_product<2>(p);
}

}  // namespace bitmill::detail
