// SPDX-License-Identifier: Apache-2.0
// Scales of FP4 weights with AVX-512: E8M0 and E4M3 bytes to floats, and the scales of a tile's rows side by side.
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
  const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x7F800000));
  // Bytes 0 and 255, and no others, are below 2 after 1 is added modulo 256.
  const __m512i next = _mm512_add_epi32(bits, _mm512_set1_epi32(1 << 23));
  const __mmask16 half = _mm512_testn_epi32_mask(next, _mm512_set1_epi32(0x7F000000));
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, half, bits, _mm512_set1_epi32(0x400000)));
}

// E4M3 in the lowest byte of each lane; the other bytes are ignored.
static inline __m512 e4m3_to_floats(__m512i bytes) {
  const __m512i magnitude = _mm512_and_si512(bytes, _mm512_set1_epi32(0x7F));
  const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
  const __mmask16 subnormal = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
  const __m512 value = _mm512_mask_mul_ps(_mm512_castsi512_ps(normal), subnormal, _mm512_cvtepi32_ps(magnitude),
                                          _mm512_set1_ps(0x1p-9f));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7F));
  const __m512i bits = _mm512_mask_mov_epi32(_mm512_castps_si512(value), nan, _mm512_set1_epi32(0x7FC00000));
  const __m512i sign = _mm512_and_si512(_mm512_slli_epi32(bytes, 24), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_or_si512(bits, sign));
}

// 16 bytes of each of 16 lanes to dwords: z[i] has the i-th of every lane.
static inline void load_step(const char* const (&lane)[kTileRows], int64_t offset, __m512 (&z)[4]) {
  const auto load = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(lane[i] + offset)); };
  for (int i = 0; i < 4; ++i) {
    z[i] = _mm512_castps128_ps512(load(i));
    z[i] = _mm512_insertf32x4(z[i], load(i + 4), 1);
    z[i] = _mm512_insertf32x4(z[i], load(i + 8), 2);
    z[i] = _mm512_insertf32x4(z[i], load(i + 12), 3);
  }
  transpose4(z);
}

// 64 scale bytes as 4 times 16 floats, that of the lowest byte of each lane at a time. Where all are ordinary, neither
// NaN nor subnormal nor negative, a few instructions do it.
struct E8m0Scales {
  static bool ordinary(__m512i bytes) {
    const __m512i next = _mm512_add_epi8(bytes, _mm512_set1_epi8(1));  // 0 of NaN, 1 of 2^-127
    return _mm512_cmplt_epu8_mask(next, _mm512_set1_epi8(2)) == 0;
  }
  static __m512 ordinary_floats(__m512i bytes) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x7F800000)));
  }
  static __m512 floats(__m512i bytes) { return e8m0_to_floats(bytes); }
};
struct E4m3Scales {
  __m512 global;
  static bool ordinary(__m512i bytes) {
    const __m512i above = _mm512_sub_epi8(bytes, _mm512_set1_epi8(8));  // the first normal number
    return _mm512_cmplt_epu8_mask(above, _mm512_set1_epi8(0x7F - 8)) == ~__mmask64{0};
  }
  __m512 ordinary_floats(__m512i bytes) const {
    const __m512i magnitude = _mm512_and_si512(_mm512_slli_epi32(bytes, 20), _mm512_set1_epi32(0x7F << 20));
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_add_epi32(magnitude, _mm512_set1_epi32(120 << 23))), global);
  }
  __m512 floats(__m512i bytes) const { return _mm512_mul_ps(e4m3_to_floats(bytes), global); }
};

// The scales of a tile's 16 rows times `unit` to floats [groups][16]. Lanes past n repeat the last row.
static inline void expand_scales(const Fp4Weight& w, int64_t groups, int64_t tile, float unit, float* out) {
  const int64_t first = tile * kTileRows, last = w.n - 1 - first;
  const auto start_of = [&](int64_t lane) { return (first + (lane < last ? lane : last)) * groups; };
  const int64_t step = w.scale ? 4 : 16;  // groups in 16 bytes of a row
  if (groups < step) {
    for (int64_t i = 0; i < groups * kTileRows; ++i) {
      out[i] = weight_scale(w, start_of(i % kTileRows) + i / kTileRows) * unit;
    }
    return;
  }
  const int64_t size = w.scale ? 4 : 1;
  const char* lane[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) {
    lane[i] = (w.scale ? reinterpret_cast<const char*>(w.scale) : reinterpret_cast<const char*>(w.scale_bytes)) +
              start_of(i) * size;
  }
  const __m512 units = _mm512_set1_ps(unit);
  const auto expand = [&](const auto& scales) {
    for (int64_t next = 0; next < groups; next += 16) {
      const int64_t group = next + 16 <= groups ? next : groups - 16;  // the last ones overlap
      __m512 z[4];
      load_step(lane, group, z);
      float* to = out + group * kTileRows;
      for (int i = 0; i < 4; ++i) {
        __m512i bytes = _mm512_castps_si512(z[i]);
        const auto store4 = [&](const auto& floats) {
          for (int j = 4 * i; j < 4 * i + 4; ++j, bytes = _mm512_srli_epi32(bytes, 8)) {
            _mm512_storeu_ps(to + j * kTileRows, _mm512_mul_ps(floats(bytes), units));
          }
        };
        if (scales.ordinary(bytes)) {
          store4([&](__m512i b) { return scales.ordinary_floats(b); });
        } else {
          store4([&](__m512i b) { return scales.floats(b); });
        }
      }
    }
  };
  if (w.global_scale) return expand(E4m3Scales{_mm512_set1_ps(*w.global_scale)});
  if (w.scale_bytes) return expand(E8m0Scales{});
  for (int64_t next = 0; next < groups; next += 4) {
    const int64_t group = next + 4 <= groups ? next : groups - 4;
    __m512 z[4];
    load_step(lane, 4 * group, z);
    for (int i = 0; i < 4; ++i) _mm512_storeu_ps(out + (group + i) * kTileRows, _mm512_mul_ps(z[i], units));
  }
}

// Asks for the scales of a tile, which lie together.
static inline void prefetch_scales(const Fp4Weight& w, int64_t groups, int64_t tile) {
  const int64_t size = w.scale ? 4 : 1, first = tile * kTileRows * groups * size;
  const char* scale = w.scale ? reinterpret_cast<const char*>(w.scale) : reinterpret_cast<const char*>(w.scale_bytes);
  for (int64_t i = 0; i < kTileRows * groups * size; i += 64) _mm_prefetch(scale + first + i, _MM_HINT_T1);
}

}  // namespace bitmill::detail
