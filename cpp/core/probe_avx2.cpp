// SPDX-License-Identifier: Apache-2.0
// The arithmetic of binary_matmul (lookup, add), of float32 products (FMA) and of int8 products (multiply and add
// pairs, add) on 256-bit registers.
#include <immintrin.h>

#include "probe.h"
#include "probe_chains.h"

namespace bitmill::detail {

double popcount_peak_avx2() {
  const __m256i bits = _mm256_set1_epi8(5);
  return 128 * steps_per_second(bits, [bits](__m256i& sum) {
           __m256i counts = _mm256_shuffle_epi8(bits, sum);  // 4 columns of 32 outputs
           asm volatile("" : "+x"(counts));
           sum = _mm256_add_epi8(sum, counts);
           asm volatile("" : "+x"(sum));
         });
}

double int8_peak_avx2() {
  const __m256i ones = _mm256_set1_epi8(1);
  return 32 * steps_per_second(ones, [ones](__m256i& sum) {
           __m256i pairs = _mm256_maddubs_epi16(sum, ones);
           asm volatile("" : "+x"(pairs));
           sum = _mm256_add_epi16(sum, pairs);
           asm volatile("" : "+x"(sum));
         });
}

double float32_peak_avx2() {
  const __m256 half = _mm256_set1_ps(0.5f);
  return 8 * steps_per_second(half, [half](__m256& sum) {
           sum = _mm256_fmadd_ps(sum, half, half);
           asm volatile("" : "+x"(sum));
         });
}

}  // namespace bitmill::detail
