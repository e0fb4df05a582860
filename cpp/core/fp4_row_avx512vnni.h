// SPDX-License-Identifier: Apache-2.0
// One row of int8 activations times FP4 weights, tile after tile, with a scale for a whole row of weights or a scale
// byte for every 2 or 4 words of codes. A byte is used once, so it stays one until then: the bytes of 16 groups are
// transposed, 4 groups to a lane, and a rotation, a mask and a product make floats of one of them. Memory is never idle
// for long: nothing is expanded in one go.
#pragma once

#include "fp4_tiles_avx512.h"
#include "read_ahead.h"

namespace bitmill::detail {

struct Int8Row {
  __m512i table;             // 64 unsigned bytes: value plus offset, 4 times
  const int32_t* x;          // 4 columns of each of the two steps of a word
  const int32_t* first_sum;  // [groups]
  const float* scale;        // [groups], or null

  // A word of 16 outputs, times its 8 columns, added to their sums.
  [[gnu::always_inline]] __m512i add(__m512i sum, const int32_t* codes, int64_t w) const {
    const __m512i bits = _mm512_loadu_si512(codes + w * kTileRows);
    read_ahead(codes + w * kTileRows);
    sum = _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(bits, table), _mm512_set1_epi32(x[2 * w]));
    return _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(_mm512_srli_epi32(bits, 4), table),
                               _mm512_set1_epi32(x[2 * w + 1]));
  }
};

// Adds the sums of groups to the result: from `group` on to the first 16 whose scales are not ordinary, or, if not
// `ordinary`, of 16 groups. Answers the group after them.
template <int words, bool grouped, bool ordinary, class Scales>
[[gnu::noinline]] static int64_t add_groups(const Int8Row& row, const Fp4Weight& weight, int64_t tile, int64_t groups,
                                            const Scales& scales, int64_t group, __m512& result) {
  const int32_t* codes = weight.tiles + tile * groups * words * kTileRows;
  const auto* bytes = reinterpret_cast<const char*>(weight.scale_bytes);
  __m512 sum = result;
  do {
    const int64_t last = group + 16 < groups ? group + 16 : groups, base = last - 16;
    __m512 z[4];
    load_tile_step(bytes, groups, weight.n, tile, base, z);
    if (ordinary && !are_ordinary(scales, z)) break;
    for (; group < last; ++group) {
      if (begins_page(group * words)) read_page_ahead(codes + group * words * kTileRows);
      _mm_prefetch(bytes + (tile + 1) * kTileRows * groups + 32 * group, _MM_HINT_T1);  // of two tiles
      __m512i dot = _mm512_set1_epi32(row.first_sum[group]);
#pragma GCC unroll 4
      for (int i = 0; i < words; ++i) dot = row.add(dot, codes, group * words + i);
      const auto at = static_cast<uint32_t>(group - base);
      const __m512i left = _mm512_set1_epi32(static_cast<int>((ordinary ? Scales::kShift : 0) - at % 4 * 8));
      const __m512i lanes = _mm512_rolv_epi32(_mm512_castps_si512(z[at / 4]), left);
      __m512 scale;
      if constexpr (ordinary) {
        scale = ordinary_floats(scales, lanes);
      } else {
        scale = scales.any(lanes);
      }
      __m512 total = _mm512_cvtepi32_ps(dot);
      if constexpr (grouped) total = _mm512_mul_ps(_mm512_set1_ps(row.scale[group]), total);
      sum = _mm512_add_ps(sum, _mm512_mul_ps(scale, total));
    }
  } while (ordinary && group < groups);
  result = sum;
  return group;
}

// Tiles [begin, end) of weights with scale bytes; store(tile, 16 results).
template <int words, bool grouped, class Scales, class Store>
static void multiply_row(const Fp4Weight& w, const Int8Row& row, const Scales& scales, int64_t begin, int64_t end,
                         const Store& store) {
  const int64_t groups = word_count(w.k, 4) / words;
  for (int64_t tile = begin; tile < end; ++tile) {
    __m512 result = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups;) {
      group = add_groups<words, grouped, true>(row, w, tile, groups, scales, group, result);
      if (group < groups) group = add_groups<words, grouped, false>(row, w, tile, groups, scales, group, result);
    }
    store(tile, result);
  }
}

// The same of weights with one scale for each of their rows, times `unit`.
template <class Store>
static void multiply_whole_row(const Fp4Weight& w, const Int8Row& row, float unit, int64_t begin, int64_t end,
                               const Store& store) {
  const int64_t words = word_count(w.k, 4);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int32_t* codes = w.tiles + tile * words * kTileRows;
    __m512i s0 = _mm512_set1_epi32(row.first_sum[0]), s1 = _mm512_setzero_si512(), s2 = s1, s3 = s1;
    int64_t i = 0;
    for (; i + 4 <= words; i += 4) {
      if (begins_page(i)) read_page_ahead(codes + i * kTileRows);
      s0 = row.add(s0, codes, i);
      s1 = row.add(s1, codes, i + 1);
      s2 = row.add(s2, codes, i + 2);
      s3 = row.add(s3, codes, i + 3);
    }
    for (; i < words; ++i) s0 = row.add(s0, codes, i);
    const __m512i dot = _mm512_add_epi32(_mm512_add_epi32(s0, s1), _mm512_add_epi32(s2, s3));
    const int64_t column = tile * kTileRows;
    const __m512 scale = _mm512_maskz_loadu_ps(first_lanes(w.n - column), w.scale + column);
    const __m512 value = _mm512_mul_ps(_mm512_mul_ps(scale, _mm512_set1_ps(unit)), _mm512_cvtepi32_ps(dot));
    store(tile, _mm512_add_ps(_mm512_setzero_ps(), value));  // no negative zero, as a sum of groups has none
  }
}

}  // namespace bitmill::detail
