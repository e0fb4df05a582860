// SPDX-License-Identifier: Apache-2.0
// Scales of FP4 weights with AVX2: E8M0 and E4M3 bytes to floats, and the scales of a tile's rows side by side.
#pragma once

#include <cstring>

#include "avx2.h"
#include "fp4.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

// biased_log2 of 8 magnitudes.
static inline __m256i biased_log2(__m256i magnitude, bool up) {
  if (!up) return _mm256_srli_epi32(magnitude, 23);
  // All but one of the step from a power of two to the next; 2^-127, byte 0, is the subnormal 0x400000.
  const __m256i subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x800000), magnitude);
  const __m256i step = _mm256_blendv_epi8(_mm256_set1_epi32(0x7FFFFF), _mm256_set1_epi32(0x3FFFFF), subnormal);
  return _mm256_srli_epi32(_mm256_add_epi32(magnitude, step), 23);
}

// e8m0_to_float of 8 numbers 0 ... 255. Bytes 0 and 255 have the bit of 2^-1 in the mantissa.
static inline __m256 e8m0_to_floats(__m256i bytes) {
  const __m256i next = _mm256_and_si256(_mm256_add_epi32(bytes, _mm256_set1_epi32(1)), _mm256_set1_epi32(0xFE));
  const __m256i half = _mm256_and_si256(_mm256_cmpeq_epi32(next, _mm256_setzero_si256()), _mm256_set1_epi32(0x400000));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(bytes, 23), half));
}

// e4m3_to_float of 16 bytes, the first ones first. A float16 has the same fields with one more bit of exponent, which
// makes values 2^8 times smaller.
struct FloatPair {
  __m256 first, second;
};
static inline FloatPair e4m3_to_floats(__m128i bytes) {
  const __m256i fields = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);  // the sign in bit 14 too
  const __m256i magnitude = _mm256_and_si256(fields, _mm256_set1_epi16(0x3F80));
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3F80));
  const __m256i number = _mm256_andnot_si256(_mm256_set1_epi16(0x4000), fields);
  const __m256i halves = _mm256_blendv_epi8(number, _mm256_set1_epi16(0x7E00), nan);
  const auto floats = [](__m128i h) { return _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256.0f)); };
  return {floats(_mm256_castsi256_si128(halves)), floats(_mm256_extracti128_si256(halves, 1))};
}

// 8 bytes of each of 8 rows to bytes of 8 rows: put(column, those of this column and of the next one).
template <class Put>
static inline void transpose_bytes(const uint8_t* const (&rows)[8], const Put& put) {
  const auto load = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[i])); };
  const __m128i a = _mm_unpacklo_epi8(load(0), load(1)), b = _mm_unpacklo_epi8(load(2), load(3));
  const __m128i c = _mm_unpacklo_epi8(load(4), load(5)), d = _mm_unpacklo_epi8(load(6), load(7));
  const __m128i ab_low = _mm_unpacklo_epi16(a, b), cd_low = _mm_unpacklo_epi16(c, d);
  const __m128i ab_high = _mm_unpackhi_epi16(a, b), cd_high = _mm_unpackhi_epi16(c, d);
  put(0, _mm_unpacklo_epi32(ab_low, cd_low));
  put(2, _mm_unpackhi_epi32(ab_low, cd_low));
  put(4, _mm_unpacklo_epi32(ab_high, cd_high));
  put(6, _mm_unpackhi_epi32(ab_high, cd_high));
}

// The scales of 8 rows of a tile, those from `row` on, times a unit, to floats of which two groups are kTileRows apart.
// Rows past n repeat the last one.
static inline void expand_scales8(const Fp4Weight& w, int64_t groups, int64_t row, float unit, float* out) {
  int64_t first[8];
  for (int64_t i = 0; i < 8; ++i) first[i] = (row + i < w.n ? row + i : w.n - 1) * groups;
  if (groups < 8) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t i = 0; i < 8; ++i) out[group * kTileRows + i] = weight_scale(w, first[i] + group) * unit;
    }
    return;
  }
  const __m256 factor = _mm256_set1_ps(unit), global = _mm256_set1_ps(w.global_scale ? *w.global_scale : 1.0f);
  for (int64_t next = 0; next < groups; next += 8) {
    const int64_t group = next + 8 <= groups ? next : groups - 8;  // the last ones overlap
    float* to = out + group * kTileRows;
    if (w.scale) {
      __m256 z[8];
      for (int i = 0; i < 8; ++i) z[i] = _mm256_loadu_ps(w.scale + first[i] + group);
      transpose8(z);
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * kTileRows, _mm256_mul_ps(z[i], factor));
      continue;
    }
    const uint8_t* rows[8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = w.scale_bytes + first[i] + group;
      _mm_prefetch(reinterpret_cast<const char*>(rows[i] + kTileRows * groups), _MM_HINT_T0);  // of the next tile
    }
    transpose_bytes(rows, [&](int i, __m128i bytes) {
      FloatPair pair;
      if (w.global_scale) {
        pair = e4m3_to_floats(bytes);
        pair = {_mm256_mul_ps(pair.first, global), _mm256_mul_ps(pair.second, global)};
      } else {
        pair = {e8m0_to_floats(_mm256_cvtepu8_epi32(bytes)),
                e8m0_to_floats(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
      }
      _mm256_storeu_ps(to + i * kTileRows, _mm256_mul_ps(pair.first, factor));
      _mm256_storeu_ps(to + (i + 1) * kTileRows, _mm256_mul_ps(pair.second, factor));
    });
  }
}

// The scales of a tile's 16 rows, times a unit, to floats [groups][16].
static inline void expand_scales(const Fp4Weight& w, int64_t groups, int64_t tile, float unit, float* out) {
  expand_scales8(w, groups, tile * kTileRows, unit, out);
  expand_scales8(w, groups, tile * kTileRows + 8, unit, out + 8);
}

}  // namespace
}  // namespace bitmill::detail
