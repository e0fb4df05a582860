// SPDX-License-Identifier: Apache-2.0
// What the AVX2 forms of the salient part with float activations share: what an entry adds to the sign plane.
#pragma once

#include "salient_scatter_avx2.h"

namespace bitmill::detail {

struct SalientFloatRows {
  const SalientTask& task;
  int64_t width;        // of a row that is multiplied: k, or the number of salient columns
  const float* x;       // [m, width]
  const float* totals;  // [m, groups]: X_g
};

// 8 values from element i on as floats. All of them must exist.
template <bool codes>
static inline __m256 load_values(const void* value, int64_t i) {
  if constexpr (codes) {
    const auto* bytes = static_cast<const uint8_t*>(value) + i;
    return codes_to_floats(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  }
  return load8(static_cast<const Float16*>(value) + i);
}

// What is missing at a salient weight after the sign plane: value - (mu - alpha).
template <bool codes>
static inline __m256 difference(__m256 value, __m256 base, __m256 scale, __m256 zero) {
  if constexpr (codes) return _mm256_fmsub_ps(_mm256_sub_ps(value, zero), scale, base);
  return _mm256_sub_ps(value, base);
}

// The base of 8 outputs of a list, each in its own column.
static inline __m256 base_of(const SalientTask& task, const TileFactors& factors, __m128i column, int64_t half) {
  const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(int(half)));
  // A column and a multiple of 32 below 2^24: the quotient in floats is exact enough to round down.
  const __m256 width = _mm256_set1_ps(static_cast<float>(task.group_width));
  const __m256 column_of = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(column));
  const __m256i group = _mm256_cvttps_epi32(_mm256_div_ps(column_of, width));
  return _mm256_i32gather_ps(factors.base, _mm256_add_epi32(_mm256_slli_epi32(group, 4), lane), 4);
}

// A step of a list: columns, and differences of 16 outputs. No entry is column k and 0.
template <bool codes, bool grouped>
static inline Outputs take_step(const SalientTask& task, const TileFactors& factors, int64_t step, ListColumns& list,
                                uint16_t* column) {
  const SalientWeight& w = task.weight;
  const uint8_t* gap = w.gap + step * kTileRows;
  prefetch(gap);
  prefetch(static_cast<const char*>(w.value) + step * kTileRows * (codes ? 1 : 2));
  list.move(gap);
  const __m256i columns = list.columns(w.k);
  store_bits(column, columns);
  const auto half = [&](int64_t first, __m128i where, __m128i none) {
    __m256 base = _mm256_loadu_ps(factors.base + first);
    if constexpr (grouped) {  // column k may begin a group that does not exist
      base = base_of(task, factors, _mm_andnot_si128(none, where), first);
    }
    const __m256 value = load_values<codes>(w.value, step * kTileRows + first);
    const __m256 found =
        difference<codes>(value, base, _mm256_load_ps(factors.scale + first), _mm256_load_ps(factors.zero + first));
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cvtepi16_epi32(none)), found);
  };
  return {half(0, _mm256_castsi256_si128(columns), _mm256_castsi256_si128(list.none)),
          half(8, _mm256_extracti128_si256(columns, 1), _mm256_extracti128_si256(list.none, 1))};
}

// All rows of a list or a bitmap, transposed; for few rows the single form is faster. salient_tiles_avx2 chooses.
void salient_many_rows_avx2(const SalientFloatRows& rows, int64_t begin, int64_t end);

}  // namespace bitmill::detail
