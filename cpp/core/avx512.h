// SPDX-License-Identifier: Apache-2.0
// What the AVX-512 files share: lane masks, and 16 floats to and from memory in each dtype.
#pragma once

#include <immintrin.h>

#include "floats.h"

namespace bitmill::detail {

// The first `count` of 16 lanes.
static inline __mmask16 first_lanes(int64_t count) {
  if (count >= 16) return __mmask16{0xFFFF};
  return static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}

static inline __m512 widen(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
static inline __m512 load16(const BFloat16* x) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
static inline __m512 load16(const Float16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// Lanes outside the mask are 0 and are not read.
static inline __m512 load16(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
static inline __m512 load16(const BFloat16* x, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, x)); }
static inline __m512 load16(const Float16* x, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x));
}

// The scales [n, groups] of one group and the 16 outputs from `column` on. Lanes outside the mask are 0, and not read.
static inline __m512 load_scale(const float* scale, int64_t groups, int64_t column, int64_t group, __mmask16 lanes) {
  if (groups == 1) return _mm512_maskz_loadu_ps(lanes, scale + column);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(groups)));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, index, scale + column * groups + group, 4);
}

// Masked stores, of 16-bit values above all, are slow on Zen 4: whole vectors go without.
static inline void store16(void* out, __mmask16 lanes, __m256i halves) {
  if (lanes == 0xFFFF) return _mm256_storeu_si256(static_cast<__m256i*>(out), halves);
  _mm256_mask_storeu_epi16(out, lanes, halves);
}
static inline void store16(float* out, __mmask16 lanes, __m512 value) {
  if (lanes == 0xFFFF) return _mm512_storeu_ps(out, value);
  _mm512_mask_storeu_ps(out, lanes, value);
}
static inline void store16(Float16* out, __mmask16 lanes, __m512 value) {
  const __m256i halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  store16(static_cast<void*>(out), lanes, halves);
}
static inline void store16(BFloat16* out, __mmask16 lanes, __m512 value) {
  // vcvtneps2bf16 flushes subnormals, so the rounding is done by hand.
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i halves = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0));
  store16(static_cast<void*>(out), lanes, _mm512_cvtepi32_epi16(halves));
}

// 4 rows of 4 values in every 128-bit part, to columns.
static inline void transpose4(__m512 (&z)[4]) {
  const __m512 a = _mm512_unpacklo_ps(z[0], z[1]), b = _mm512_unpackhi_ps(z[0], z[1]);
  const __m512 c = _mm512_unpacklo_ps(z[2], z[3]), d = _mm512_unpackhi_ps(z[2], z[3]);
  const auto low = [](__m512 u, __m512 v) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(u), _mm512_castps_pd(v)));
  };
  const auto high = [](__m512 u, __m512 v) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(u), _mm512_castps_pd(v)));
  };
  z[0] = low(a, c);
  z[1] = high(a, c);
  z[2] = low(b, d);
  z[3] = high(b, d);
}

// 16 rows of 16 values to 16 columns. A gather, which would do the same 16 values at a time, takes ten times as long.
static inline void transpose16(__m512 (&z)[16]) {
  __m512 part[4][4];  // [row / 4][column % 4]: the column's 4 rows, for the columns of every 128-bit part
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) part[i][r] = z[4 * i + r];
    transpose4(part[i]);
  }
#pragma GCC unroll 4
  for (int column = 0; column < 4; ++column) {
    const __m512 a = _mm512_shuffle_f32x4(part[0][column], part[1][column], 0x44);
    const __m512 b = _mm512_shuffle_f32x4(part[2][column], part[3][column], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(part[0][column], part[1][column], 0xEE);
    const __m512 d = _mm512_shuffle_f32x4(part[2][column], part[3][column], 0xEE);
    z[column] = _mm512_shuffle_f32x4(a, b, 0x88);
    z[column + 4] = _mm512_shuffle_f32x4(a, b, 0xDD);
    z[column + 8] = _mm512_shuffle_f32x4(c, d, 0x88);
    z[column + 12] = _mm512_shuffle_f32x4(c, d, 0xDD);
  }
}

static inline void transpose16(const float* in, int64_t row_width, float* out, int64_t stride) {
  __m512 z[16];
#pragma GCC unroll 16
  for (int64_t r = 0; r < 16; ++r) z[r] = _mm512_loadu_ps(in + r * row_width);
  transpose16(z);
#pragma GCC unroll 16
  for (int64_t c = 0; c < 16; ++c) _mm512_storeu_ps(out + c * stride, z[c]);
}

}  // namespace bitmill::detail
