// SPDX-License-Identifier: Apache-2.0
// Scales of FP4 weights with AVX2: E8M0 and E4M3 bytes to floats, and the scales of a tile's rows side by side.
#pragma once

#include <cstring>

#include "avx2.h"
#include "fp4.h"
#include "layout.h"

namespace bitmill::detail {

// 8 rows of 8 values to columns.
static inline void transpose8(__m256 (&z)[8]) {
  __m256 pair[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(z[i], z[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(z[i], z[i + 1]);
  }
  __m256 four[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
    four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    z[i] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
    z[i + 4] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
  }
}

// e8m0_to_float of 8 numbers 0 ... 255. Bytes 0 and 255 have the bit of 2^-1 in the mantissa.
static inline __m256 e8m0_to_floats(__m256i bytes) {
  const __m256i next = _mm256_and_si256(_mm256_add_epi32(bytes, _mm256_set1_epi32(1)), _mm256_set1_epi32(0xFE));
  const __m256i half = _mm256_and_si256(_mm256_cmpeq_epi32(next, _mm256_setzero_si256()), _mm256_set1_epi32(0x400000));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(bytes, 23), half));
}

// e4m3_to_float of 8 numbers 0 ... 255.
static inline __m256 e4m3_to_floats(__m256i bytes) {
  const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi32(0x7F));
  const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
  const __m256i subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
  const __m256 value =
      _mm256_blendv_ps(_mm256_castsi256_ps(normal), small, _mm256_castsi256_ps(subnormal));
  const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(bytes, 7), 31);
  const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F));
  const __m256 number = _mm256_or_ps(value, _mm256_castsi256_ps(sign));
  return _mm256_blendv_ps(number, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), _mm256_castsi256_ps(nan));
}

// 8 bytes of each of 8 rows to vectors of 8 rows.
template <class Put>
static inline void transpose_bytes(const uint8_t* const (&rows)[8], const Put& put) {
  const auto load = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[i])); };
  const __m128i a = _mm_unpacklo_epi8(load(0), load(1)), b = _mm_unpacklo_epi8(load(2), load(3));
  const __m128i c = _mm_unpacklo_epi8(load(4), load(5)), d = _mm_unpacklo_epi8(load(6), load(7));
  const auto two = [&](int column, __m128i left, __m128i right) {
    const __m128i low = _mm_unpacklo_epi32(left, right), high = _mm_unpackhi_epi32(left, right);
    put(column, _mm256_cvtepu8_epi32(low));
    put(column + 1, _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(low, low)));
    put(column + 2, _mm256_cvtepu8_epi32(high));
    put(column + 3, _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(high, high)));
  };
  two(0, _mm_unpacklo_epi16(a, b), _mm_unpacklo_epi16(c, d));
  two(4, _mm_unpackhi_epi16(a, b), _mm_unpackhi_epi16(c, d));
}

// The scales of 8 rows of a tile, those from `row` on, to floats of which two groups are kTileRows apart. Rows past n
// repeat the last one.
static inline void expand_scales8(const Fp4Weight& w, int64_t groups, int64_t row, float* out) {
  int64_t first[8];
  for (int64_t i = 0; i < 8; ++i) first[i] = (row + i < w.n ? row + i : w.n - 1) * groups;
  if (groups < 8) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t i = 0; i < 8; ++i) out[group * kTileRows + i] = weight_scale(w, first[i] + group);
    }
    return;
  }
  const __m256 global = _mm256_set1_ps(w.global_scale ? *w.global_scale : 1.0f);
  for (int64_t next = 0; next < groups; next += 8) {
    const int64_t group = next + 8 <= groups ? next : groups - 8;  // the last ones overlap
    float* to = out + group * kTileRows;
    if (w.scale) {
      __m256 z[8];
      for (int i = 0; i < 8; ++i) z[i] = _mm256_loadu_ps(w.scale + first[i] + group);
      transpose8(z);
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * kTileRows, z[i]);
      continue;
    }
    const uint8_t* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = w.scale_bytes + first[i] + group;
    if (w.global_scale) {
      transpose_bytes(rows, [&](int i, __m256i bytes) {
        _mm256_storeu_ps(to + i * kTileRows, _mm256_mul_ps(e4m3_to_floats(bytes), global));
      });
    } else {
      transpose_bytes(rows,
                      [&](int i, __m256i bytes) { _mm256_storeu_ps(to + i * kTileRows, e8m0_to_floats(bytes)); });
    }
  }
}

// The scales of a tile's 16 rows to floats [groups][16].
static inline void expand_scales(const Fp4Weight& w, int64_t groups, int64_t tile, float* out) {
  expand_scales8(w, groups, tile * kTileRows, out);
  expand_scales8(w, groups, tile * kTileRows + 8, out + 8);
}

}  // namespace bitmill::detail
