// SPDX-License-Identifier: Apache-2.0
// The arithmetic of binary_matmul (xor, popcount, add) and of float32 products (FMA) on 512-bit registers.
#include <immintrin.h>

#include "probe.h"
#include "probe_chains.h"

namespace bitmill::detail {

double popcount_peak_avx512() {
  const __m512i bits = _mm512_set1_epi32(0x5A5A5A5A);
  return 512 * steps_per_second(bits, [bits](__m512i& sum) {
           __m512i different = _mm512_xor_si512(sum, bits);
           asm volatile("" : "+v"(different));  // the xor must stay in the loop
           sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(different));
           asm volatile("" : "+v"(sum));
         });
}

double float32_peak_avx512() {
  const __m512 half = _mm512_set1_ps(0.5f);
  return 16 * steps_per_second(half, [half](__m512& sum) {
           sum = _mm512_fmadd_ps(sum, half, half);
           asm volatile("" : "+v"(sum));
         });
}

}  // namespace bitmill::detail
