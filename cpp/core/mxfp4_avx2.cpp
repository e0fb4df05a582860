// SPDX-License-Identifier: Apache-2.0
// MXFP4 blocks with AVX2, bit-equal to the generic form.
#include "fp4_blocks_avx2.h"
#include "fp4_scales_avx2.h"

namespace bitmill::detail {
namespace {

struct Mxfp4Format {
  static constexpr int kWidth = kMxBlock;
  ScaleRule rule;

  // mxfp4_scale. 1 / 2^E is exact and normal: a finite block has at most byte 253.
  ScaledBlocks scaled(__m256i amax) const {
    const __m256i finite = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x7F800000), amax);
    if (rule == ScaleRule::even) {
      amax = _mm256_add_epi32(amax, _mm256_and_si256(finite, _mm256_set1_epi32(1 << 21)));
    }
    __m256i byte;
    if (rule == ScaleRule::rceil) {
      const __m256 sixth = _mm256_mul_ps(_mm256_castsi256_ps(amax), _mm256_set1_ps(1.0f / 6.0f));
      byte = biased_log2(_mm256_castps_si256(sixth), true);
    } else {
      byte = _mm256_subs_epu16(biased_log2(amax, rule == ScaleRule::ceil), _mm256_set1_epi32(2));
    }
    const __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x7F800000), amax);
    const __m256i exponent = _mm256_sub_epi32(_mm256_set1_epi32(254), byte);
    return {_mm256_blendv_epi8(_mm256_set1_epi32(255), byte, valid),
            _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)), valid};
  }
};

}  // namespace

void mxfp4_quantize_rows_avx2(const Mxfp4QuantizeParams& p, int64_t begin, int64_t end) {
  quantize_rows(p, Mxfp4Format{p.rule}, begin, end);
}

void mxfp4_dequantize_rows_avx2(const uint8_t* packed, const uint8_t* scale, int64_t k, float* values, int64_t begin,
                                int64_t end) {
  const Fp4RowLookup<2> lookup(fp4_table(kE2M1).value);
  const RowsAsOne rows = rows_as_one(begin, end, k, k % kMxBlock == 0);
  for (int64_t row = begin; row < rows.end; ++row) {
    const uint8_t* units = scale + row * ceil_div(k, kMxBlock);
    uncast_row(lookup, packed + row * ceil_div(k, 2), rows.k, values + row * k, [&](int64_t block, int, __m256 v) {
      return _mm256_mul_ps(_mm256_set1_ps(e8m0_to_float(units[block])), v);
    });
  }
  _mm_sfence();
}

}  // namespace bitmill::detail
