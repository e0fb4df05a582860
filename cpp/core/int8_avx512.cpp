// SPDX-License-Identifier: Apache-2.0
// Rounding rows to int8 with AVX-512: one pass for the largest magnitude, one to round. Bit-equal to the generic form.
#include "avx512.h"
#include "int8.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

template <class T>
void quantize_row(const T* x, int64_t k, int8_t* q, float* scale, int32_t* total) {
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 16) {
    const __m512i bits = _mm512_castps_si512(load16(x + i, first_lanes(k - i)));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude_bits));
  }
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
  const __m512 inverse = _mm512_set1_ps(127.0f / amax), top = _mm512_set1_ps(127.0f);
  const __m512 bottom = _mm512_set1_ps(-127.0f);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 16) {
    const __mmask16 lanes = first_lanes(k - i);
    const __m512 scaled = _mm512_mul_ps(load16(x + i, lanes), inverse);
    const __mmask16 numbers = _mm512_mask_cmp_ps_mask(lanes, scaled, scaled, _CMP_ORD_Q);
    const __m512 level = _mm512_maskz_max_ps(numbers, _mm512_min_ps(scaled, top), bottom);
    const __m512i integers = _mm512_cvtps_epi32(level);
    _mm512_mask_cvtepi32_storeu_epi8(q + i, lanes, integers);
    sum = _mm512_add_epi32(sum, integers);
  }
  *scale = amax / 127.0f;
  *total = _mm512_reduce_add_epi32(sum);
}

}  // namespace

void int8_quantize_rows_avx512(const Int8QuantizeParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t total;
      quantize_row(x + row * p.k, p.k, p.q + row * p.k, p.scale + row, &total);
      if (p.total) p.total[row] = total;
    }
  });
}

}  // namespace bitmill::detail
