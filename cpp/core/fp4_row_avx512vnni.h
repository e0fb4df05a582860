// SPDX-License-Identifier: Apache-2.0
// One row of int8 activations times FP4 weights with a scale byte for every 2 or 4 words of codes. A scale is used
// once, so it stays a byte until then: the bytes of 16 groups are transposed, 4 groups to a lane, and a rotation, a
// mask and a product make floats of one of them. Memory is never idle for long: nothing is expanded in one go.
#pragma once

#include "fp4_tiles_avx512.h"

namespace bitmill::detail {

inline constexpr int kRowTiles = 2;               // side by side: memory is read fastest from one or two places
inline constexpr int64_t kRowPrefetchWords = 48;  // kPrefetchWords for fewer tiles

struct Int8Row {
  __m512i table;             // 64 unsigned bytes: value plus offset, 4 times
  const int32_t* x;          // 4 columns of each of the two steps of a word
  const int32_t* first_sum;  // [groups]
  const float* scale;        // [groups], or null
};

// The tiles that are multiplied, and what is asked for meanwhile.
struct Int8RowTiles {
  const Fp4Weight& w;
  int64_t words, groups;
  int64_t tile[kRowTiles];
  const char* next_scales;  // of as many tiles after these

  const int32_t* codes(int t) const { return w.tiles + tile[t] * words * kTileRows; }
};

// Adds the sums of groups to the results: from `group` on to the first 16 whose scales are not ordinary, or, if not
// `ordinary`, of 16 groups. Answers the group after them.
template <int words, bool grouped, bool ordinary, class Scales>
[[gnu::noinline]] static int64_t add_groups(const Int8Row& row, const Int8RowTiles& tiles, const Scales& scales,
                                            int64_t group, __m512 (&result)[kRowTiles]) {
  __m512 r0 = result[0], r1 = result[1];
  const int32_t *c0 = tiles.codes(0), *c1 = tiles.codes(1);
  const auto* bytes = reinterpret_cast<const char*>(tiles.w.scale_bytes);
  do {
    const int64_t last = group + 16 < tiles.groups ? group + 16 : tiles.groups, base = last - 16;
    __m512 z[kRowTiles][4];
    bool all = true;
    for (int t = 0; t < kRowTiles; ++t) {
      load_tile_step(bytes, tiles.groups, tiles.w.n, tiles.tile[t], base, z[t]);
      if constexpr (ordinary) all &= are_ordinary(scales, z[t]);
    }
    if (!all) break;
    for (; group < last; ++group) {
      const __m512i start = _mm512_set1_epi32(row.first_sum[group]);
      __m512i s0 = start, s1 = start;
#pragma GCC unroll 4
      for (int i = 0; i < words; ++i) {
        const int64_t w = group * words + i, next = w + kRowPrefetchWords;
        const int64_t ahead = next < tiles.words ? next : next + (kRowTiles - 1) * tiles.words;
        const __m512i a = _mm512_set1_epi32(row.x[2 * w]), b = _mm512_set1_epi32(row.x[2 * w + 1]);
        const auto add = [&](__m512i sum, const int32_t* codes) __attribute__((always_inline)) {
          const __m512i bits = _mm512_loadu_si512(codes + w * kTileRows);
          _mm_prefetch(reinterpret_cast<const char*>(codes + ahead * kTileRows), _MM_HINT_T1);
          sum = _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(bits, row.table), a);
          return _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(_mm512_srli_epi32(bits, 4), row.table), b);
        };
        s0 = add(s0, c0);
        s1 = add(s1, c1);
      }
      const auto at = static_cast<uint32_t>(group - base);
      const __m512i left = _mm512_set1_epi32(static_cast<int>((ordinary ? Scales::kShift : 0) - at % 4 * 8));
      const auto fold = [&](__m512 sum, __m512i dot, int t) __attribute__((always_inline)) {
        const __m512i lanes = _mm512_rolv_epi32(_mm512_castps_si512(z[t][at / 4]), left);
        __m512 scale;
        if constexpr (ordinary) {
          scale = ordinary_floats(scales, lanes);
        } else {
          scale = scales.any(lanes);
        }
        __m512 total = _mm512_cvtepi32_ps(dot);
        if constexpr (grouped) total = _mm512_mul_ps(_mm512_set1_ps(row.scale[group]), total);
        return _mm512_add_ps(sum, _mm512_mul_ps(scale, total));
      };
      r0 = fold(r0, s0, 0);
      r1 = fold(r1, s1, 1);
      _mm_prefetch(tiles.next_scales + 64 * group, _MM_HINT_T1);
    }
  } while (ordinary && group < tiles.groups);
  result[0] = r0;
  result[1] = r1;
  return group;
}

// Tiles [begin, end) of one row; store(tile, 16 results).
template <int words, bool grouped, class Scales, class Store>
static void multiply_row(const Fp4Weight& w, const Int8Row& row, const Scales& scales, int64_t begin, int64_t end,
                         const Store& store) {
  const int64_t all = word_count(w.k, 4), groups = all / words;
  for (int64_t tile = begin; tile < end; tile += kRowTiles) {
    const auto clamp = [&](int64_t t) { return t < end ? t : end - 1; };  // not stored past the end
    const auto* scale = reinterpret_cast<const char*>(w.scale_bytes);
    const Int8RowTiles tiles{
        w, all, groups, {tile, clamp(tile + 1)}, scale + clamp(tile + kRowTiles) * kTileRows * groups};
    __m512 result[kRowTiles] = {};
    for (int64_t group = 0; group < groups;) {
      group = add_groups<words, grouped, true>(row, tiles, scales, group, result);
      if (group < groups) group = add_groups<words, grouped, false>(row, tiles, scales, group, result);
    }
    for (int t = 0; t < kRowTiles && tile + t < end; ++t) store(tile + t, result[t]);
  }
}

}  // namespace bitmill::detail
