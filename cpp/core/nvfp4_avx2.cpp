// SPDX-License-Identifier: Apache-2.0
// NVFP4 blocks with AVX2, bit-equal to the generic form.
#include "fp4_blocks_avx2.h"
#include "nvfp4.h"

namespace bitmill::detail {
namespace {

struct Nvfp4Format {
  static constexpr int kWidth = kNvBlock;
  __m256 global, inverse_global;

  explicit Nvfp4Format(float g) : global(_mm256_set1_ps(g)), inverse_global(_mm256_set1_ps(1.0f / g)) {}

  // nvfp4_scaled. A quotient that is NaN has an inverse that is NaN, so any scale may stand for it.
  ScaledBlocks scaled(__m256i amax) const {
    const __m256 wanted = _mm256_div_ps(_mm256_div_ps(_mm256_castsi256_ps(amax), _mm256_set1_ps(6.0f)), global);
    const __m256 clamped = _mm256_min_ps(_mm256_max_ps(wanted, _mm256_set1_ps(0x1p-6f)), _mm256_set1_ps(448.0f));
    const __m256i bits = _mm256_castps_si256(clamped);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
    const __m256i above = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFFF)));
    const __m256i rounded = _mm256_srli_epi32(above, 20);  // E4M3, but for its bias
    const __m256 inverse = _mm256_div_ps(inverse_global, _mm256_castsi256_ps(_mm256_slli_epi32(rounded, 20)));
    // Neither negative nor 0, infinity or NaN.
    const __m256 infinity = _mm256_castsi256_ps(_mm256_set1_epi32(0x7F800000));
    const __m256 positive = _mm256_cmp_ps(inverse, _mm256_setzero_ps(), _CMP_GT_OQ);
    const __m256 finite = _mm256_and_ps(_mm256_cmp_ps(inverse, infinity, _CMP_LT_OQ),
                                        _mm256_cmp_ps(_mm256_castsi256_ps(amax), infinity, _CMP_LT_OQ));
    const __m256i valid = _mm256_castps_si256(_mm256_and_ps(positive, finite));
    const __m256i byte = _mm256_sub_epi32(rounded, _mm256_set1_epi32(120 << 3));
    return {_mm256_blendv_epi8(_mm256_set1_epi32(127), byte, valid), inverse, valid};
  }
};

}  // namespace

void nvfp4_quantize_rows_avx2(const Nvfp4QuantizeParams& p, int64_t begin, int64_t end) {
  quantize_rows(p, Nvfp4Format(p.global_scale ? *p.global_scale : 1.0f), begin, end);
}

void nvfp4_dequantize_rows_avx2(const Nvfp4DequantizeParams& p, int64_t begin, int64_t end) {
  const Fp4RowLookup<2> lookup(fp4_table(kE2M1).value);
  const __m256 global = _mm256_set1_ps(p.global_scale ? *p.global_scale : 1.0f);
  const RowsAsOne rows = rows_as_one(begin, end, p.k, p.k % kNvBlock == 0 && p.k % 2 == 0);
  for (int64_t row = begin; row < rows.end; ++row) {
    const uint8_t* scale = p.scale + row * ceil_div(p.k, kNvBlock);
    const int64_t last = ceil_div(rows.k, kNvBlock) - 1;
    uncast_row(lookup, p.packed + row * ceil_div(p.k, 2), rows.k, p.values + row * p.k,
               [&](int64_t block, int i, __m256 v) {
                 const int64_t at = 2 * block + i / 2;
                 const __m256 unit = _mm256_set1_ps(e4m3_to_float(scale[at < last ? at : last]));
                 return _mm256_mul_ps(_mm256_mul_ps(unit, v), global);
               });
  }
  _mm_sfence();
}

}  // namespace bitmill::detail
