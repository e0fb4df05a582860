// SPDX-License-Identifier: Apache-2.0
// Rounding rows to int8 with AVX-512: one pass for the largest magnitude, one to round. Bit-equal to the generic form.
#include "avx512.h"
#include "int8.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

__m512i magnitude(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)); }

// A product that is not finite converts to INT32_MIN, whose low byte is 0.
__m128i round16(__m512 x, __m512 inverse, __m512i& sum) {
  const __m128i q = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
  sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(q));
  return q;
}

template <class T>
void quantize_row(const T* x, int64_t k, int8_t* q, float* scale, int32_t* total) {
  const int64_t whole = k / 16 * 16;
  const __mmask16 rest = first_lanes(k - whole);
  __m512i largest = rest ? magnitude(load16(x + whole, rest)) : _mm512_setzero_si512();
  for (int64_t i = 0; i < whole; i += 16) largest = _mm512_max_epu32(largest, magnitude(load16(x + i)));
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
  const __m512 inverse = _mm512_set1_ps(127.0f / amax);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < whole; i += 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), round16(load16(x + i), inverse, sum));
  }
  if (rest) _mm_mask_storeu_epi8(q + whole, rest, round16(load16(x + whole, rest), inverse, sum));
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
