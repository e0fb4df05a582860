// SPDX-License-Identifier: Apache-2.0
#include "avx2.h"
#include "decode_attention_heads.h"

namespace bitmill::detail {
namespace {

struct Avx2 {
  static float dot(const float* a, const float* b, int64_t d) {
    __m256 low = _mm256_setzero_ps(), high = low;
    const auto add16 = [&](const float* x, const float* y) {
      low = _mm256_add_ps(low, _mm256_mul_ps(load8(x), load8(y)));
      high = _mm256_add_ps(high, _mm256_mul_ps(load8(x + 8), load8(y + 8)));
    };
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) add16(a + i, b + i);
    if (i < d) {
      float x[16] = {}, y[16] = {};
      std::copy(a + i, a + d, x);
      std::copy(b + i, b + d, y);
      add16(x, y);
    }
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static void add_scaled(const float* values, float factor, int64_t d, float* sums) {
    const __m256 f = _mm256_set1_ps(factor);
    int64_t i = 0;
    for (; i + 8 <= d; i += 8) store8(sums + i, _mm256_add_ps(load8(sums + i), _mm256_mul_ps(f, load8(values + i))));
    for (; i < d; ++i) sums[i] += factor * values[i];
  }
};

}  // namespace

void decode_attention_heads_avx2(const DecodeAttentionParams& p, int64_t begin, int64_t end) {
  decode_attention_heads<Avx2>(p, begin, end);
}

}  // namespace bitmill::detail
