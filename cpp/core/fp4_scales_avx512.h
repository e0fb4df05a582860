// SPDX-License-Identifier: Apache-2.0
// Scales of FP4 weights with AVX-512: E8M0 bytes to floats, and the scales of a tile's rows side by side.
#pragma once

#include "avx512.h"
#include "fp4.h"
#include "layout.h"

namespace bitmill::detail {

// The same for 16 magnitudes as fp4.h's for one.
static inline __m512i biased_log2(__m512i magnitude, bool up) {
  // All but one of the step from a power of two to the next; 2^-127, byte 0, is the subnormal 0x400000.
  const __mmask16 subnormal = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x800000));
  const __m512i step = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7FFFFF), subnormal, _mm512_set1_epi32(0x3FFFFF));
  return _mm512_srli_epi32(up ? _mm512_add_epi32(magnitude, step) : magnitude, 23);
}

// E8M0 in the lowest byte of each lane; the other bytes are ignored.
static inline __m512 e8m0_to_floats(__m512i bytes) {
  const __m512i exponent = _mm512_slli_epi32(bytes, 23), all = _mm512_set1_epi32(0x7F800000);
  const __m512i bits = _mm512_and_si512(exponent, all);
  const __mmask16 half = _mm512_testn_epi32_mask(exponent, all) | _mm512_cmpeq_epi32_mask(bits, all);
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, half, bits, _mm512_set1_epi32(0x400000)));
}

// The scales of a tile's 16 rows times `unit` to floats [groups][16]. Lanes past n repeat the last row.
static inline void expand_scales(const Fp4Weight& w, int64_t groups, int64_t tile, float unit, float* out) {
  const int64_t first = tile * kTileRows, last = w.n - 1 - first;
  const auto row_of = [&](int64_t lane) { return first + (lane < last ? lane : last); };
  const auto one_group = [&](int64_t group) {
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      const int64_t index = row_of(lane) * groups + group;
      out[group * kTileRows + lane] = (w.scale ? w.scale[index] : e8m0_to_float(w.scale_bytes[index])) * unit;
    }
  };
  if (groups < 4) {
    for (int64_t group = 0; group < groups; ++group) one_group(group);
    return;
  }
  const __m512 units = _mm512_set1_ps(unit);
  for (int64_t step = 0; step < groups; step += 4) {
    const int64_t group = step + 4 <= groups ? step : groups - 4;  // the last four overlap
    float* lanes = out + group * kTileRows;
    if (w.scale) {
      __m512 z[4];
      for (int i = 0; i < 4; ++i) {
        const auto four = [&](int64_t lane) { return _mm_loadu_ps(w.scale + row_of(lane) * groups + group); };
        z[i] = _mm512_castps128_ps512(four(i));
        z[i] = _mm512_insertf32x4(z[i], four(i + 4), 1);
        z[i] = _mm512_insertf32x4(z[i], four(i + 8), 2);
        z[i] = _mm512_insertf32x4(z[i], four(i + 12), 3);
      }
      transpose4(z);
      for (int i = 0; i < 4; ++i) _mm512_storeu_ps(lanes + i * kTileRows, _mm512_mul_ps(z[i], units));
    } else {
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i row = _mm512_min_epi32(lane, _mm512_set1_epi32(static_cast<int>(last < 15 ? last : 15)));
      const __m512i index = _mm512_mullo_epi32(row, _mm512_set1_epi32(static_cast<int>(groups)));
      __m512i bytes = _mm512_i32gather_epi32(index, w.scale_bytes + first * groups + group, 1);
      for (int i = 0; i < 4; ++i, bytes = _mm512_srli_epi32(bytes, 8)) {
        _mm512_storeu_ps(lanes + i * kTileRows, _mm512_mul_ps(e8m0_to_floats(bytes), units));
      }
    }
  }
}

}  // namespace bitmill::detail
