// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "avx2.h"
#include "layer_norm_rows.h"

namespace bitmill::detail {
namespace {

struct Avx2 {
  using Register = __m256;
  static constexpr int64_t kPerRegister = 1;
  static __m256 all(float x) { return _mm256_set1_ps(x); }
  static __m256 subtract(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
  static __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
  static __m256 load(const float* const* rows, int64_t i) { return _mm256_loadu_ps(rows[0] + i); }
  static __m256 row(__m256 z, int64_t) { return z; }

  static void scale(const float* x, int64_t n, float center, float factor, const float* weight, const float* bias,
                    float* out) {
    const __m256 c = _mm256_set1_ps(center), f = _mm256_set1_ps(factor);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const __m256 z = _mm256_mul_ps(_mm256_sub_ps(load8(x + i), c), f);
      _mm256_storeu_ps(out + i, _mm256_fmadd_ps(z, load8(weight + i), load8(bias + i)));
    }
    for (; i < n; ++i) out[i] = std::fma((x[i] - center) * factor, weight[i], bias[i]);
  }
};

}  // namespace

void layer_norm_rows_avx2(const LayerNormParams& p, int64_t begin, int64_t end) {
  layer_norm_rows<Avx2>(p, begin, end);
}

}  // namespace bitmill::detail
