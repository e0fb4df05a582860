// SPDX-License-Identifier: Apache-2.0
// Packing rows of floats with AVX-512: 32 values become one word by compare-to-mask. Bit-equal to the generic form.
#include <immintrin.h>

#include <bit>

#include "bitpack.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

__m512 load(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }

__m512 load(const BFloat16* x, __mmask16 lanes) {
  const __m256i halves = _mm256_maskz_loadu_epi16(lanes, x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

__m512 load(const Float16* x, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x)); }

__mmask16 first(int64_t lanes) {
  return lanes >= 16 ? __mmask16{0xFFFF} : static_cast<__mmask16>((1u << (lanes > 0 ? lanes : 0)) - 1);
}

template <Levels levels, class T>
void pack_rows(const BitpackParams& p, const T* x, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  const __m512 zero = _mm512_setzero_ps();
  const __m512 threshold = _mm512_set1_ps(p.threshold);
  float* magnitudes = p.mean ? new float[std::bit_ceil(static_cast<uint64_t>(p.k)) + 32] : nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    int32_t* sign_row = p.sign + row * words;
    int32_t* nonzero_row = levels == Levels::sign ? p.nonzero + row * words : nullptr;
    int64_t count = 0;
    for (int64_t w = 0; w < words; ++w) {
      uint32_t sign = 0, nonzero = 0;
      for (int half = 0; half < 2; ++half) {
        const int64_t column = 32 * w + 16 * half;
        const __mmask16 lanes = first(p.k - column);
        if (!lanes) break;
        __m512 z = load(input + column, lanes);
        if (p.shift) z = _mm512_add_ps(z, _mm512_maskz_loadu_ps(lanes, p.shift + column));
        if (p.mean) _mm512_storeu_ps(magnitudes + column, _mm512_abs_ps(z));
        __mmask16 bits;
        if constexpr (levels == Levels::sign) {
          bits = _mm512_mask_cmp_ps_mask(lanes, z, zero, _CMP_GT_OQ);
          nonzero |= static_cast<uint32_t>(_mm512_mask_cmp_ps_mask(lanes, z, zero, _CMP_NEQ_OQ)) << (16 * half);
        } else if constexpr (levels == Levels::plus) {
          bits = _mm512_mask_cmp_ps_mask(lanes, z, zero, _CMP_GE_OQ);
        } else {
          bits = _mm512_mask_cmp_ps_mask(lanes, z, threshold, _CMP_GT_OQ);
        }
        sign |= static_cast<uint32_t>(bits) << (16 * half);
      }
      sign_row[w] = static_cast<int32_t>(sign);
      if constexpr (levels == Levels::sign) nonzero_row[w] = static_cast<int32_t>(nonzero);
      count += _mm_popcnt_u32(levels == Levels::sign ? nonzero : sign);
    }
    if (p.count) p.count[row] = static_cast<int32_t>(count);
    if (p.mean) p.mean[row] = mean_by_halves(magnitudes, p.k);
  }
  delete[] magnitudes;
}

}  // namespace

void bitpack_rows_avx512(const BitpackParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    switch (p.levels) {
      case Levels::sign:
        return pack_rows<Levels::sign>(p, x, begin, end);
      case Levels::plus:
        return pack_rows<Levels::plus>(p, x, begin, end);
      case Levels::bool_:
        return pack_rows<Levels::bool_>(p, x, begin, end);
    }
  });
}

}  // namespace bitmill::detail
