// SPDX-License-Identifier: Apache-2.0
// Rounding rows to int8 with AVX2: one pass for the largest magnitude, one to round. Bit-equal to the generic form.
#include <cstring>

#include "avx2.h"
#include "int8.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kStep = 32;  // columns of a vector of bytes

template <class T>
void raise(__m256i& largest, const T* x) {
  for (int i = 0; i < kStep; i += 8) largest = _mm256_max_epu32(largest, magnitudes(load8(x + i)));
}

int32_t sum_of(__m256i values) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

// A product that is not finite converts to INT32_MIN, whose low byte is 0; packing takes low bytes, and saturates none.
template <class T>
__m256i round32(const T* x, __m256 inverse, __m256i& sum) {
  const auto low = [&](int i) {
    const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(load8(x + i), inverse));
    return _mm256_and_si256(q, _mm256_set1_epi32(0xFF));
  };
  const __m256i a = _mm256_packus_epi32(low(0), low(8)), b = _mm256_packus_epi32(low(16), low(24));
  const __m256i q = in_order(_mm256_packus_epi16(a, b));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  return q;
}

template <class T>
void quantize_row(const T* x, int64_t k, int8_t* q, float* scale, int32_t* total) {
  const int64_t whole = k / kStep * kStep;
  const auto rest = static_cast<size_t>(k - whole);
  T last[kStep] = {};  // the columns after the whole steps, and zeros
  if (rest) std::memcpy(last, x + whole, rest * sizeof(T));
  __m256i largest = _mm256_setzero_si256(), sum = largest;
  raise(largest, last);
  for (int64_t i = 0; i < whole; i += kStep) raise(largest, x + i);
  const float amax = std::bit_cast<float>(highest(largest));
  const __m256 inverse = _mm256_set1_ps(127.0f / amax);
  for (int64_t i = 0; i < whole; i += kStep) {
    store_bits(q + i, round32(x + i, inverse, sum));
  }
  if (rest) {
    alignas(32) int8_t bytes[kStep];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), round32(last, inverse, sum));
    std::memcpy(q + whole, bytes, rest);
  }
  *scale = amax / 127.0f;
  *total = sum_of(sum);
}

}  // namespace

void int8_quantize_rows_avx2(const Int8QuantizeParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t total;
      quantize_row(x + row * p.k, p.k, p.q + row * p.k, p.scale + row, &total);
      if (p.total) p.total[row] = total;
    }
  });
}

}  // namespace bitmill::detail
