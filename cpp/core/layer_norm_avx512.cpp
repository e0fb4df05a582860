// SPDX-License-Identifier: Apache-2.0
// The moments in vectors of 8, as torch's, of two rows in a register.
#include "avx512.h"
#include "layer_norm_rows.h"

namespace bitmill::detail {
namespace {

struct Avx512 {
  using Register = __m512;
  static constexpr int64_t kPerRegister = 2;
  static __m512 all(float x) { return _mm512_set1_ps(x); }
  static __m512 subtract(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
  static __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
  static __m512 load(const float* const* rows, int64_t i) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(rows[0] + i)), _mm256_loadu_ps(rows[1] + i), 1);
  }
  static __m256 row(__m512 z, int64_t r) { return r == 0 ? _mm512_castps512_ps256(z) : _mm512_extractf32x8_ps(z, 1); }

  static void scale(const float* x, int64_t n, float center, float factor, const float* weight, const float* bias,
                    float* out) {
    const __m512 c = _mm512_set1_ps(center), f = _mm512_set1_ps(factor);
    const auto finish = [&](__m512 z, __m512 w, __m512 b) {
      return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(z, c), f), w, b);
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store16(out + i, 0xFFFF, finish(load16(x + i), load16(weight + i), load16(bias + i)));
    if (i == n) return;
    const __mmask16 rest = first_lanes(n - i);
    store16(out + i, rest, finish(load16(x + i, rest), load16(weight + i, rest), load16(bias + i, rest)));
  }
};

}  // namespace

void layer_norm_rows_avx512(const LayerNormParams& p, int64_t begin, int64_t end) {
  layer_norm_rows<Avx512>(p, begin, end);
}

}  // namespace bitmill::detail
