// SPDX-License-Identifier: Apache-2.0
#include "avx512.h"
#include "prompt_attention_blocks.h"

namespace bitmill::detail {
namespace {

struct Avx512 {
  using Vector = __m512;
  static constexpr int64_t kWidth = 16, kRows = 8;

  static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
  static __m512 broadcast(float x) { return _mm512_set1_ps(x); }
  static __m512 fma(__m512 a, __m512 b, __m512 sum) {
    sum = _mm512_fmadd_ps(a, b, sum);
    asm volatile("" : "+v"(sum));  // one after the other; otherwise g++ runs out of registers
    return sum;
  }
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    transpose16(from, stride, to, to_stride);
  }

  static __m512 exponential(__m512 x) {
    using E = Exponential;
    const __mmask16 large = _mm512_cmp_ps_mask(x, _mm512_set1_ps(E::kLeast), _CMP_NLT_UQ);
    const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(E::kLog2E)));
    __m512 r = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(n), _mm512_set1_ps(E::kLn2), x);
    r = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(n), _mm512_set1_ps(E::kRest), r);
    __m512 y = _mm512_set1_ps(E::kFirst);
    for (const float c : E::kNext) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    const __m512i scaled = _mm512_add_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(n, 23));
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(large, scaled));
  }

  static float softmax(float* scores, int64_t count) {
    __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), least = most, sums = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; t += 16) {
      most = _mm512_max_ps(_mm512_mask_loadu_ps(least, first_lanes(count - t), scores + t), most);
    }
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t t = 0; t < count; t += 16) {
      const __m512 score = _mm512_mask_loadu_ps(least, first_lanes(count - t), scores + t);
      const __m512 weight = _mm512_maskz_mov_ps(first_lanes(count - t), exponential(_mm512_sub_ps(score, most)));
      sums = _mm512_add_ps(sums, weight);
      _mm512_storeu_ps(scores + t, weight);
    }
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace

PromptKernel prompt_attention_avx512() { return kernel_of<Avx512>(); }

}  // namespace bitmill::detail
