// SPDX-License-Identifier: Apache-2.0
// Blocks with a scale byte, quantised with AVX-512. A `Format` has
//   kWidth          values of a block, 16 or 32
//   scaled(amax)    what follows from the largest magnitudes of the blocks, one a lane
#pragma once

#include <cstring>

#include "fp4_cast_avx512.h"
#include "fp4_uncast_avx512.h"

namespace bitmill::detail {

// Of 16 blocks. Of one that is not `valid` all codes are 0.
struct ScaledBlocks {
  __m512i byte;
  __m512 inverse;
  __mmask16 valid;
};

static inline __m512i magnitudes(__m512 value) {
  return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF));
}

// The largest lane of each of four vectors.
static inline __m128i largest_of_each(const __m512i* v) {
  const auto pairs = [](__m512i a, __m512i b) {
    return _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i left = pairs(v[0], v[1]), right = pairs(v[2], v[3]);
  const __m512i fours = _mm512_max_epu32(_mm512_unpacklo_epi64(left, right), _mm512_unpackhi_epi64(left, right));
  const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(fours), _mm512_extracti64x4_epi64(fours, 1));
  return _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// The largest magnitudes of the blocks of 128 values, one a lane.
template <int width, class T>
static inline __m256i largest_magnitudes(const T* x) {
  constexpr int blocks = kCastBlock / width;
  __m512i largest[blocks];
#pragma GCC unroll 8
  for (int i = 0; i < blocks; ++i) {
    largest[i] = magnitudes(load16(x + width * i));
    if constexpr (width == 32) largest[i] = _mm512_max_epu32(largest[i], magnitudes(load16(x + width * i + 16)));
  }
  const __m256i first = _mm256_zextsi128_si256(largest_of_each(largest));
  if constexpr (blocks == 8) return _mm256_inserti128_si256(first, largest_of_each(largest + 4), 1);
  return first;
}

// 128 values, each times the inverse of its block, to codes.
template <int width, class T>
static inline __m512i scaled_codes(const Fp4Caster& caster, const T* x, const float* inverse) {
  __m512i codes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto scaled16 = [&](int j) { return _mm512_mul_ps(load16(x + j), _mm512_set1_ps(inverse[j / width])); };
    __mmask32 nans = 0;
    codes[i] = codes_of(caster, words_of(caster, scaled16(32 * i), scaled16(32 * i + 16)), nans);
  }
  return join(caster, codes[0], codes[1], codes[2], codes[3]);
}

inline constexpr int64_t kRun = 8 * kCastBlock;  // values whose scales are made before their codes

// Asks for 128 values, which arrive while codes are made.
template <class T>
static inline void request_block(const T* x) {
  constexpr int64_t line = 64 / sizeof(T);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kCastBlock; i += line) __builtin_prefetch(x + i);
}

// A multiple of 128 values, at most kRun. What a scale takes is a long chain of operations: so many go on side by side.
template <bool stream, class Format, class T>
static inline void quantize_run(const Fp4Caster& caster, const Format& format, const T* x, int64_t count,
                                uint8_t* packed, uint8_t* scale) {
  constexpr int width = Format::kWidth, blocks = kCastBlock / width;
  alignas(64) uint32_t amax[kRun / width + 4];
  for (int64_t i = 0; i < count; i += kCastBlock) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(amax + i / width), largest_magnitudes<width>(x + i));
  }
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(-1));  // makes code 0 of all values
  alignas(64) float inverse[kRun / width];
  uint8_t bytes[kRun / width];
  for (int64_t block = 0; block < count / width; block += 16) {
    const ScaledBlocks scaled = format.scaled(_mm512_load_si512(amax + block));
    _mm512_store_ps(inverse + block, _mm512_mask_mov_ps(nan, scaled.valid, scaled.inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + block), _mm512_cvtepi32_epi8(scaled.byte));
  }
  for (int64_t i = 0; i < count; i += kCastBlock) {
    if constexpr (stream) request_block(x + kRun + i);
    std::memcpy(scale + i / width, bytes + i / width, blocks);
    store_bytes<stream>(packed + i / 2, scaled_codes<width>(caster, x + i, inverse + i / width));
  }
}

template <bool stream, class Format, class T>
static void quantize_row(const Fp4Caster& caster, const Format& format, const T* x, int64_t k, uint8_t* packed,
                         uint8_t* scale) {
  constexpr int64_t width = Format::kWidth;
  const int64_t whole = k / kCastBlock * kCastBlock, left = k - whole;
  for (int64_t column = 0; column < whole; column += kRun) {
    const int64_t count = whole - column < kRun ? whole - column : kRun;
    quantize_run<stream>(caster, format, x + column, count, packed + column / 2, scale + column / width);
  }
  if (left == 0) return;
  T last[kCastBlock] = {};
  std::memcpy(last, x + whole, static_cast<size_t>(left) * sizeof(T));
  alignas(64) uint8_t bytes[kCastBlock / 2];
  uint8_t scales[kCastBlock / width];
  quantize_run<false>(caster, format, last, kCastBlock, bytes, scales);
  std::memcpy(packed + whole / 2, bytes, static_cast<size_t>(ceil_div(left, 2)));
  std::memcpy(scale + whole / width, scales, static_cast<size_t>(ceil_div(left, width)));
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

}  // namespace bitmill::detail
