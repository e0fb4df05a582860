// SPDX-License-Identifier: Apache-2.0
// MXFP4 blocks with AVX-512, 4 blocks at a time, bit-equal to the generic form.
#include <cstring>

#include "fp4_cast_avx512.h"
#include "fp4_uncast_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kBlocks = kCastBlock / kMxBlock;

__m512i magnitudes(__m512 value) { return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF)); }

// The largest lane of each of four vectors.
__m128i largest_of_each(const __m512i (&v)[4]) {
  const auto pairs = [](__m512i a, __m512i b) {
    return _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i left = pairs(v[0], v[1]), right = pairs(v[2], v[3]);
  const __m512i fours = _mm512_max_epu32(_mm512_unpacklo_epi64(left, right), _mm512_unpackhi_epi64(left, right));
  const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(fours), _mm512_extracti64x4_epi64(fours, 1));
  return _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// The bytes of the scales of blocks whose largest magnitudes are `amax`, one a lane: mxfp4_scale.
__m512i scale_bytes(__m512i amax, ScaleRule rule) {
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
  return _mm512_mask_mov_epi32(byte, _mm512_cmpge_epi32_mask(amax, infinity), _mm512_set1_epi32(255));
}

// 128 values, 4 scales.
template <class T>
__m512i quantize_block(const Fp4Caster& caster, const T* x, ScaleRule rule, uint8_t* scale) {
  __m512i largest[kBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kBlocks; ++i) {
    largest[i] = _mm512_max_epu32(magnitudes(load16(x + 32 * i)), magnitudes(load16(x + 32 * i + 16)));
  }
  const __m512i byte = scale_bytes(_mm512_zextsi128_si512(largest_of_each(largest)), rule);
  _mm512_mask_cvtepi32_storeu_epi8(scale, 0xF, byte);
  // 1 / 2^E is exact and normal: a finite block has at most byte 253. The values of another block become NaN, code 0.
  const __mmask16 finite = _mm512_cmplt_epi32_mask(byte, _mm512_set1_epi32(255));
  const __m512i exponent = _mm512_sub_epi32(_mm512_set1_epi32(254), byte);
  alignas(64) float inverse[16];
  _mm512_store_si512(inverse, _mm512_mask_slli_epi32(_mm512_set1_epi32(-1), finite, exponent, 23));
  __m512i codes[kBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kBlocks; ++i) {
    const __m512 factor = _mm512_set1_ps(inverse[i]);
    const __m512 a = _mm512_mul_ps(load16(x + 32 * i), factor), b = _mm512_mul_ps(load16(x + 32 * i + 16), factor);
    __mmask32 nans = 0;
    codes[i] = codes_of(caster, words_of(caster, a, b), nans);
  }
  return join(caster, codes[0], codes[1], codes[2], codes[3]);
}

template <class T>
void quantize_row(const Fp4Caster& caster, const T* x, int64_t k, ScaleRule rule, uint8_t* packed, uint8_t* scale) {
  int64_t column = 0;
  for (; column + kCastBlock <= k; column += kCastBlock) {
    const __m512i bytes = quantize_block(caster, x + column, rule, scale + column / kMxBlock);
    _mm512_storeu_si512(packed + column / 2, bytes);
  }
  if (column == k) return;
  T last[kCastBlock] = {};
  std::memcpy(last, x + column, static_cast<size_t>(k - column) * sizeof(T));
  uint8_t bytes[kCastBlock / 2], scales[kBlocks];
  _mm512_storeu_si512(bytes, quantize_block(caster, last, rule, scales));
  std::memcpy(packed + column / 2, bytes, static_cast<size_t>(ceil_div(k - column, 2)));
  std::memcpy(scale + column / kMxBlock, scales, static_cast<size_t>(ceil_div(k - column, kMxBlock)));
}

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
  const Fp4Caster caster = make_caster<float>(kE2M1, NanPolicy::zero, p.rounding);
  const RowsAsOne rows = rows_as_one(begin, end, p.k, p.k % kMxBlock == 0 && p.row_stride == p.k);
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    for (int64_t row = begin; row < rows.end; ++row) {
      quantize_row(caster, x + row * p.row_stride, rows.k, p.rule, p.packed + row * ceil_div(p.k, 2),
                   p.scale + row * ceil_div(p.k, kMxBlock));
    }
  });
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
