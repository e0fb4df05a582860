// SPDX-License-Identifier: Apache-2.0
// MXFP4 blocks with AVX-512, bit-equal to the generic form.
#include "fp4_blocks_avx512.h"

namespace bitmill::detail {
namespace {

struct Mxfp4Format {
  static constexpr int kWidth = kMxBlock;
  ScaleRule rule;

  // mxfp4_scale. 1 / 2^E is exact and normal: a finite block has at most byte 253.
  ScaledBlocks scaled(__m512i amax) const {
    const __m512i infinity = _mm512_set1_epi32(0x7F800000);
    if (rule == ScaleRule::even) {
      amax = _mm512_mask_add_epi32(amax, _mm512_cmplt_epi32_mask(amax, infinity), amax, _mm512_set1_epi32(1 << 21));
    }
    __m512i byte;
    if (rule == ScaleRule::rceil) {
      const __m512 sixth = _mm512_mul_ps(_mm512_castsi512_ps(amax), _mm512_set1_ps(1.0f / 6.0f));
      byte = biased_log2(_mm512_castps_si512(sixth), true);
    } else {
      byte = _mm512_subs_epu16(biased_log2(amax, rule == ScaleRule::ceil), _mm512_set1_epi32(2));
    }
    byte = _mm512_mask_mov_epi32(byte, _mm512_cmpge_epi32_mask(amax, infinity), _mm512_set1_epi32(255));
    const __m512i exponent = _mm512_sub_epi32(_mm512_set1_epi32(254), byte);
    return {byte, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)),
            _mm512_cmplt_epi32_mask(byte, _mm512_set1_epi32(255))};
  }
};

template <bool stream>
void dequantize_row(__m512 table, const uint8_t* packed, const uint8_t* scale, int64_t k, float* values) {
  int64_t column = 0;
  for (; column + kMxBlock <= k; column += kMxBlock) {
    const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(e8m0_to_float(scale[column / kMxBlock])), table);
    for (int64_t i = column; i < column + kMxBlock; i += 16) {
      store_floats<stream>(values + i, _mm512_permutexvar_ps(load_codes(packed + i / 2), scaled));
    }
  }
  for (int64_t i = column; i < k; i += 16) {
    const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(e8m0_to_float(scale[column / kMxBlock])), table);
    const __m512 last = _mm512_permutexvar_ps(load_codes(packed + i / 2, k - i), scaled);
    _mm512_mask_storeu_ps(values + i, first_lanes(k - i), last);
  }
}

}  // namespace

void mxfp4_quantize_rows_avx512(const Mxfp4QuantizeParams& p, int64_t begin, int64_t end) {
  quantize_rows(p, Mxfp4Format{p.rule}, begin, end);
}

void mxfp4_dequantize_rows_avx512(const uint8_t* packed, const uint8_t* scale, int64_t k, float* values, int64_t begin,
                                  int64_t end) {
  constexpr Fp4Table kTable = fp4_table(kE2M1);
  const __m512 table = _mm512_loadu_ps(kTable.value);
  const RowsAsOne rows = rows_as_one(begin, end, k, k % kMxBlock == 0);
  for (int64_t row = begin; row < rows.end; ++row) {
    const uint8_t *codes = packed + row * ceil_div(k, 2), *units = scale + row * ceil_div(k, kMxBlock);
    float* out = values + row * k;
    past_the_cache(out, rows.k * 4) ? dequantize_row<true>(table, codes, units, rows.k, out)
                                    : dequantize_row<false>(table, codes, units, rows.k, out);
  }
  _mm_sfence();
}

}  // namespace bitmill::detail
