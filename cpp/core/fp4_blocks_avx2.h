// SPDX-License-Identifier: Apache-2.0
// Blocks with a scale byte, quantised with AVX2. A `Format` has
//   kWidth          values of a block, 16 or 32
//   scaled(amax)    what follows from the largest magnitudes of 8 blocks, one a lane
#pragma once

#include "fp4_cast_avx2.h"

namespace bitmill::detail {
namespace {

// Of 8 blocks. Of one that is not `valid`, all ones or 0, all codes are 0.
struct ScaledBlocks {
  __m256i byte;
  __m256 inverse;
  __m256i valid;
};

// The largest lane of each of 8 vectors.
static inline __m256i largest_of_each(const __m256i (&v)[8]) {
  const auto pairs = [](__m256i a, __m256i b) {
    return _mm256_max_epu32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  };
  const auto fours = [&](const __m256i* f) {
    const __m256i left = pairs(f[0], f[1]), right = pairs(f[2], f[3]);
    return _mm256_max_epu32(_mm256_unpacklo_epi64(left, right), _mm256_unpackhi_epi64(left, right));
  };
  const __m256i first = fours(v), second = fours(v + 4);
  return _mm256_max_epu32(_mm256_permute2x128_si256(first, second, 0x20),
                          _mm256_permute2x128_si256(first, second, 0x31));
}

// 8 blocks.
template <bool stream, class Format, class T>
static inline void quantize_run(const Fp4Caster& caster, const Format& format, const T* x, uint8_t* packed,
                                uint8_t* scale) {
  constexpr int width = Format::kWidth;
  __m256i largest[8];
#pragma GCC unroll 8
  for (int block = 0; block < 8; ++block) {
    largest[block] = magnitudes(load8(x + width * block));
#pragma GCC unroll 4
    for (int i = 8; i < width; i += 8) {
      largest[block] = _mm256_max_epu32(largest[block], magnitudes(load8(x + width * block + i)));
    }
  }
  const ScaledBlocks scaled = format.scaled(largest_of_each(largest));
  const __m256i nan = _mm256_set1_epi32(-1);  // makes code 0 of all values
  alignas(32) float inverse[8];
  _mm256_store_ps(inverse,
                  _mm256_blendv_ps(_mm256_castsi256_ps(nan), scaled.inverse, _mm256_castsi256_ps(scaled.valid)));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(scaled.byte), _mm256_extracti128_si256(scaled.byte, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(scale), _mm_packus_epi16(words, words));
  uint32_t nans = 0;
  for (int i = 0; i < 8 * width; i += kCastBlock) {
    const auto value = [&](int j) {
      return _mm256_mul_ps(load8(x + i + 8 * j), _mm256_broadcast_ss(inverse + (i + 8 * j) / width));
    };
    cast_floats<stream>(caster, value, packed + i / 2, nans);
  }
}

template <bool stream, class Format, class T>
static void quantize_row(const Fp4Caster& caster, const Format& format, const T* x, int64_t k, uint8_t* packed,
                         uint8_t* scale) {
  constexpr int64_t width = Format::kWidth, run = 8 * width;
  int64_t column = 0;
  for (; column + run <= k; column += run) {
    quantize_run<stream>(caster, format, x + column, packed + column / 2, scale + column / width);
  }
  if (column == k) return;
  T last[run] = {};
  std::memcpy(last, x + column, static_cast<size_t>(k - column) * sizeof(T));
  uint8_t bytes[run / 2], scales[8];
  quantize_run<false>(caster, format, last, bytes, scales);
  std::memcpy(packed + column / 2, bytes, static_cast<size_t>(ceil_div(k - column, 2)));
  std::memcpy(scale + column / width, scales, static_cast<size_t>(ceil_div(k - column, width)));
}

// Rows [begin, end) of Mxfp4QuantizeParams or Nvfp4QuantizeParams.
template <class Format, class Params>
static void quantize_rows(const Params& p, const Format& format, int64_t begin, int64_t end) {
  const Fp4Caster caster = make_caster<float>(kE2M1, NanPolicy::zero, p.rounding);
  const RowsAsOne rows = rows_as_one(begin, end, p.k, p.k % Format::kWidth == 0 && p.row_stride == p.k);
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    for (int64_t row = begin; row < rows.end; ++row) {
      uint8_t *packed = p.packed + row * ceil_div(p.k, 2), *scale = p.scale + row * ceil_div(p.k, Format::kWidth);
      const auto* values = x + row * p.row_stride;
      past_the_cache(packed, rows.k / 2) ? quantize_row<true>(caster, format, values, rows.k, packed, scale)
                                         : quantize_row<false>(caster, format, values, rows.k, packed, scale);
    }
  });
  _mm_sfence();
}

}  // namespace
}  // namespace bitmill::detail
