// SPDX-License-Identifier: Apache-2.0
// Dot products of four int8 pairs on 512-bit registers.
#include <immintrin.h>

#include "probe.h"
#include "probe_chains.h"

namespace bitmill::detail {

double int8_peak_avx512vnni() {
  const __m512i ones = _mm512_set1_epi8(1);
  return 64 * steps_per_second(ones, [ones](__m512i& sum) {
           sum = _mm512_dpbusd_epi32(sum, ones, ones);
           asm volatile("" : "+v"(sum));
         });
}

}  // namespace bitmill::detail
