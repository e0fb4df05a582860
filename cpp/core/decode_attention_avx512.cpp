// SPDX-License-Identifier: Apache-2.0
#include "avx512.h"
#include "decode_attention_heads.h"

namespace bitmill::detail {
namespace {

struct Avx512 {
  static float dot(const float* a, const float* b, int64_t d) {
    __m512 sums = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) sums = _mm512_add_ps(sums, _mm512_mul_ps(load16(a + i), load16(b + i)));
    if (i < d) {
      const __mmask16 rest = first_lanes(d - i);
      sums = _mm512_add_ps(sums, _mm512_mul_ps(load16(a + i, rest), load16(b + i, rest)));
    }
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static void add_scaled(const float* values, float factor, int64_t d, float* sums) {
    const __m512 f = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < d; i += 16) {
      const __mmask16 lanes = first_lanes(d - i);
      store16(sums + i, lanes, _mm512_add_ps(load16(sums + i, lanes), _mm512_mul_ps(f, load16(values + i, lanes))));
    }
  }
};

}  // namespace

void decode_attention_heads_avx512(const DecodeAttentionParams& p, int64_t begin, int64_t end) {
  decode_attention_heads<Avx512>(p, begin, end);
}

}  // namespace bitmill::detail
