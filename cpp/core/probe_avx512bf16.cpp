// SPDX-License-Identifier: Apache-2.0
// Dot products of bfloat16 pairs on 512-bit registers.
#include <immintrin.h>

#include "probe.h"
#include "probe_chains.h"

namespace bitmill::detail {

double bfloat16_peak_avx512bf16() {
  const auto ones = (__m512bh)_mm512_set1_epi16(0x3F80);
  return 32 * steps_per_second(_mm512_setzero_ps(), [ones](__m512& sum) {
           sum = _mm512_dpbf16_ps(sum, ones, ones);
           asm volatile("" : "+v"(sum));
         });
}

}  // namespace bitmill::detail
