// SPDX-License-Identifier: Apache-2.0
// Dot products of signs of one or two words, such as an attention's scores, where n is no multiple of 16. Rows of
// results begin anywhere between two lines, a vector across two lines is written twice, and with so few words writing
// is much of the work. So the results, which follow each other row after row, are shifted to whole lines: the last
// `have` lanes of `before` begin the line at `to`. And k - 2 sum is one instruction.
#include "avx512.h"
#include "binary_matmul.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

template <int words>
void short_rows(const BinaryMatmulParams& p) {
  const __m512i count_up = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto from = [&](int lane) { return _mm512_add_epi32(count_up, _mm512_set1_epi32(lane)); };
  const __m512i columns = _mm512_set1_epi32(static_cast<int32_t>(p.k));
  const __m512i minus_two = _mm512_set1_epi32(0xFFFE);  // the lower half: a sum is at most 64
  const int64_t tiles = p.n / kTileRows;
  const int rest = static_cast<int>(p.n % kTileRows);
  int have = static_cast<int>(reinterpret_cast<uintptr_t>(p.dot) / sizeof(int32_t) % kTileRows);
  int32_t* to = p.dot - have;
  __m512i before = _mm512_setzero_si512(), shift = from(kTileRows - have);
  __mmask16 own = static_cast<__mmask16>(0xFFFF << have);  // lanes of the first line
  for (int64_t row = 0; row < p.m; ++row) {
    const __m512i a0 = _mm512_set1_epi32(p.a[row * words]), a1 = _mm512_set1_epi32(p.a[row * words + words - 1]);
    const int32_t* weight = p.weight;
    const auto next_tile = [&]() [[gnu::always_inline]] {
      __m512i sum = _mm512_popcnt_epi32(_mm512_xor_si512(a0, _mm512_loadu_si512(weight)));
      if constexpr (words == 2) {
        const __m512i second = _mm512_xor_si512(a1, _mm512_loadu_si512(weight + kTileRows));
        sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(second));
      }
      weight += words * kTileRows;
      return _mm512_dpwssd_epi32(columns, sum, minus_two);
    };
    int64_t tile = 0;
    if (row == 0) {
      const __m512i dot = next_tile();
      _mm512_mask_storeu_epi32(to, own, _mm512_permutex2var_epi32(before, shift, dot));
      to += kTileRows, before = dot, tile = 1;
    }
    for (; tile < tiles; ++tile) {
      const __m512i dot = next_tile();
      _mm512_store_si512(to, _mm512_permutex2var_epi32(before, shift, dot));
      to += kTileRows, before = dot;
    }
    const __m512i dot = next_tile(), line = _mm512_permutex2var_epi32(before, shift, dot);
    have += rest;
    if (have < kTileRows) {
      before = _mm512_permutexvar_epi32(from(have), line);
    } else {
      _mm512_store_si512(to, line);
      to += kTileRows, have -= kTileRows;
      before = _mm512_permutexvar_epi32(from(rest), dot);
    }
    shift = from(kTileRows - have);
  }
  if (have) _mm512_mask_storeu_epi32(to, first_lanes(have), _mm512_permutexvar_epi32(from(kTileRows - have), before));
}

}  // namespace

void binary_matmul_short_avx512vnni(const BinaryMatmulParams& p) {
  if (word_count(p.k) == 1) return short_rows<1>(p);
  short_rows<2>(p);
}

}  // namespace bitmill::detail
