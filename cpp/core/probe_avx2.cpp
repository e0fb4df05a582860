// SPDX-License-Identifier: Apache-2.0
// The arithmetic of float32 products (FMA) on 256-bit registers.
#include <immintrin.h>

#include "probe.h"
#include "probe_chains.h"

namespace bitmill::detail {

double float32_peak_avx2() {
  const __m256 half = _mm256_set1_ps(0.5f);
  return 8 * steps_per_second(half, [half](__m256& sum) {
           sum = _mm256_fmadd_ps(sum, half, half);
           asm volatile("" : "+x"(sum));
         });
}

}  // namespace bitmill::detail
