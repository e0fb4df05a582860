// SPDX-License-Identifier: Apache-2.0
#include "avx2.h"
#include "prompt_attention_blocks.h"

namespace bitmill::detail {
namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr int64_t kWidth = 8, kRows = 4;

  static __m256 load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* out, __m256 x) { _mm256_storeu_ps(out, x); }
  static __m256 broadcast(float x) { return _mm256_set1_ps(x); }
  static __m256 fma(__m256 a, __m256 b, __m256 sum) { return _mm256_fmadd_ps(a, b, sum); }
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int64_t i = 0; i < kWidth; ++i) {
      for (int64_t lane = 0; lane < kWidth; ++lane) to[i * to_stride + lane] = from[lane * stride + i];
    }
  }

  static __m256 exponential(__m256 x) {
    using E = Exponential;
    const __m256 small = _mm256_cmp_ps(x, _mm256_set1_ps(E::kLeast), _CMP_LT_OQ);
    const __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(E::kLog2E)));
    __m256 r = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(n), _mm256_set1_ps(E::kLn2), x);
    r = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(n), _mm256_set1_ps(E::kRest), r);
    __m256 y = _mm256_set1_ps(E::kFirst);
    for (const float c : E::kNext) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
    const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(n, 23));
    return _mm256_andnot_ps(small, _mm256_castsi256_ps(scaled));
  }

  // Scores past the last become -infinity, of which the weight is 0.
  static float softmax(float* scores, int64_t count) {
    const float least = -std::numeric_limits<float>::infinity();
    const int64_t whole = ceil_div(count, 16) * 16;
    std::fill(scores + count, scores + whole, least);
    __m256 most = _mm256_set1_ps(least), low = _mm256_setzero_ps(), high = low;
    for (int64_t t = 0; t < whole; t += 8) most = _mm256_max_ps(load(scores + t), most);
    float lanes[kWidth];
    store(lanes, most);
    most = broadcast(*std::max_element(lanes, lanes + kWidth));
    for (int64_t t = 0; t < whole; t += 16) {
      const auto weigh = [&](float* at) {
        const __m256 weight = exponential(_mm256_sub_ps(load(at), most));
        store(at, weight);
        return weight;
      };
      low = _mm256_add_ps(low, weigh(scores + t));
      high = _mm256_add_ps(high, weigh(scores + t + 8));
    }
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace

PromptKernel prompt_attention_avx2() { return kernel_of<Avx2>(); }

}  // namespace bitmill::detail
