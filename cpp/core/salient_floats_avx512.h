// SPDX-License-Identifier: Apache-2.0
// What the AVX-512 forms of the salient part with float activations share: what an entry of a list or of a salient
// column adds to the sign plane.
#pragma once

#include "salient_scatter_avx512.h"

namespace bitmill::detail {

struct SalientRows {
  const SalientTask& task;
  int64_t width;           // of a row that is multiplied: k, or the number of salient columns
  const float* x;          // [m, width]
  const float* totals;     // [m, groups]: X_g
  const int32_t* base_of;  // salient columns: where the base of a column lies in TileFactors
};

// The 16 values beginning with element i as floats, less the zero of their codes.
static inline __m512 load_codes(const SalientWeight& w, int64_t i, const TileFactors& factors) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(w.value) + i));
  return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), factors.zero);
}

// What is missing at a salient weight after the sign plane: value - (mu - alpha).
template <bool codes>
static inline __m512 difference(__m512 value, __m512 base, const TileFactors& factors) {
  return codes ? _mm512_fmsub_ps(value, factors.scale, base) : _mm512_sub_ps(value, base);
}

// The base of each lane's column: one for the row, or that of the column's group.
template <bool grouped>
static inline __m512 base_of(const SalientTask& task, const TileFactors& factors, __m512i column) {
  if constexpr (!grouped) return _mm512_loadu_ps(factors.base);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // A column and a multiple of 32 below 2^24: the quotient in floats is exact enough to round down.
  const __m512 width = _mm512_set1_ps(static_cast<float>(task.group_width));
  const __m512i group = _mm512_cvttps_epi32(_mm512_div_ps(_mm512_cvtepi32_ps(column), width));
  return _mm512_i32gather_ps(_mm512_add_epi32(_mm512_slli_epi32(group, 4), lane), factors.base, 4);
}

template <bool codes>
static inline __m512 load_values(const SalientWeight& w, int64_t i, const TileFactors& factors) {
  if constexpr (codes) return load_codes(w, i, factors);
  return load16(static_cast<const Float16*>(w.value) + i);
}

// A step of a list: entries, columns (at most `last`) and differences of 16 rows.
template <bool codes, bool grouped>
struct ListStep {
  __m256i state = _mm256_set1_epi16(-1), column;
  __mmask16 entries;
  __m512 difference;

  void take(const SalientTask& task, const TileFactors& factors, int64_t step, __m256i last) {
    const SalientWeight& w = task.weight;
    const uint8_t* gap = w.gap + step * kTileRows;
    const __m128i gaps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(gap));
    prefetch(gap);
    prefetch(static_cast<const char*>(w.value) + step * kTileRows * (codes ? 1 : 2));
    entries = _mm_cmpneq_epu8_mask(gaps, _mm_set1_epi8(static_cast<char>(kNoEntry)));
    state = next_columns(state, gaps, entries);
    column = _mm256_min_epu16(state, last);
    const __m512 base = base_of<grouped>(task, factors, grouped ? _mm512_cvtepu16_epi32(column) : __m512i{});
    difference = detail::difference<codes>(load_values<codes>(w, step * kTileRows, factors), base, factors);
  }
};

// Difference of salient column j for the 16 rows of a tile.
template <bool codes>
static inline __m512 column_difference(const SalientRows& rows, const int32_t* tile_values, int64_t j,
                                       const TileFactors& factors) {
  constexpr int64_t kInWord = codes ? 4 : 2;
  const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(32 / kInWord * (j % kInWord)));
  const __m512i bits = _mm512_srl_epi32(_mm512_loadu_si512(tile_values + j / kInWord * kTileRows), shift);
  const __m512 base = _mm512_loadu_ps(factors.base + rows.base_of[j]);
  if constexpr (codes) {
    const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(bits, _mm512_set1_epi32(255)));
    return difference<true>(_mm512_sub_ps(code, factors.zero), base, factors);
  }
  return difference<false>(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits)), base, factors);
}

template <bool codes>
static inline const int32_t* values_of_tile(const SalientWeight& w, int64_t tile) {
  return static_cast<const int32_t*>(w.value) + tile * word_count(w.entries, codes ? 8 : 16) * kTileRows;
}

// All rows, transposed; for few rows the single form is faster. salient_tiles_avx512 chooses.
void salient_many_rows_avx512(const SalientRows& rows, int64_t begin, int64_t end, TileFactors factors);

}  // namespace bitmill::detail
