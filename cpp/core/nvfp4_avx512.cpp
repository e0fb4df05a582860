// SPDX-License-Identifier: Apache-2.0
// NVFP4 blocks with AVX-512, bit-equal to the generic form.
#include "fp4_blocks_avx512.h"
#include "nvfp4.h"

namespace bitmill::detail {
namespace {

struct Nvfp4Format {
  static constexpr int kWidth = kNvBlock;
  __m512 global, inverse_global;

  explicit Nvfp4Format(float g) : global(_mm512_set1_ps(g)), inverse_global(_mm512_set1_ps(1.0f / g)) {}

  // nvfp4_scaled. A quotient that is NaN has an inverse that is NaN, so any scale may stand for it.
  ScaledBlocks scaled(__m512i amax) const {
    const __m512 wanted = _mm512_div_ps(_mm512_div_ps(_mm512_castsi512_ps(amax), _mm512_set1_ps(6.0f)), global);
    const __m512 clamped = _mm512_min_ps(_mm512_max_ps(wanted, _mm512_set1_ps(0x1p-6f)), _mm512_set1_ps(448.0f));
    const __m512i bits = _mm512_castps_si512(clamped);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    const __m512i above = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFFF)));
    const __m512i rounded = _mm512_srli_epi32(above, 20);  // E4M3, but for its bias
    const __m512 inverse = _mm512_div_ps(inverse_global, _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 20)));
    const auto below_infinity = [](__m512i bits) {
      return _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(0x7F800000));
    };
    const __m512i inverse_bits = _mm512_castps_si512(inverse);
    const __mmask16 positive = _mm512_cmp_ps_mask(inverse, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __mmask16 valid = below_infinity(amax) & below_infinity(inverse_bits) & positive;
    const __m512i byte = _mm512_sub_epi32(rounded, _mm512_set1_epi32(120 << 3));
    return {_mm512_mask_mov_epi32(_mm512_set1_epi32(127), valid, byte), inverse, valid};
  }
};

}  // namespace

void nvfp4_quantize_rows_avx512(const Nvfp4QuantizeParams& p, int64_t begin, int64_t end) {
  quantize_rows(p, Nvfp4Format(p.global_scale ? *p.global_scale : 1.0f), begin, end);
}

}  // namespace bitmill::detail
