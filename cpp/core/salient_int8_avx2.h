// SPDX-License-Identifier: Apache-2.0
// What the AVX2 forms of the salient part with int8 activations, uint8 codes and one group share: exact integers
// C = sum of code x q and T = sum of q over the salient weights of an output.
#pragma once

#include "salient_scatter_avx2.h"

namespace bitmill::detail {

// 8 sums: scale (C - zero T) - (mu - alpha) T.
static inline __m256 to_sum(__m256i code, __m256i plain, __m256 scale, __m256 zero, __m256 base) {
  const __m256 c = _mm256_cvtepi32_ps(code), t = _mm256_cvtepi32_ps(plain);
  return _mm256_fnmadd_ps(base, t, _mm256_mul_ps(scale, _mm256_fnmadd_ps(zero, t, c)));
}

// All rows of a list or a bitmap, transposed; for few rows other forms are faster. salient_tiles_int8_avx2 chooses.
// `totals`: of the rows of q.
void salient_int8_many_rows_avx2(const SalientTask& task, const float* totals, int64_t begin, int64_t end);

}  // namespace bitmill::detail
