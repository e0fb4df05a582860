// SPDX-License-Identifier: Apache-2.0
// Scales of FP4 weights with AVX-512: E8M0 and E4M3 bytes to floats, and the scales of a tile's rows side by side.
#pragma once

#include <cstring>

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

// 16 bytes of each of 16 rows, `stride` bytes apart, to dwords: z[i] has the i-th of every row.
static inline void load_step(const char* rows, int64_t stride, __m512 (&z)[4]) {
  const auto load = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(rows + i * stride)); };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    z[i] = _mm512_castps128_ps512(load(i));
    z[i] = _mm512_insertf32x4(z[i], load(i + 4), 1);
    z[i] = _mm512_insertf32x4(z[i], load(i + 8), 2);
    z[i] = _mm512_insertf32x4(z[i], load(i + 12), 3);
  }
  transpose4(z);
}

// Kinds of scale bytes. `any` makes floats of the lowest byte of each lane, times a unit. Ordinary bytes, kFirst to
// kLast, need no more than their bits at kShift and a product with `factor`, if the numbers are moderate.
struct E8m0Scales {
  static constexpr int kShift = 23;
  static constexpr uint8_t kFirst = 1, kLast = 254;  // all but NaN and a subnormal number
  static constexpr bool moderate = true;
  __m512 factor;

  explicit E8m0Scales(float unit) : factor(_mm512_set1_ps(unit)) {}
  __m512 any(__m512i bytes) const { return _mm512_mul_ps(e8m0_to_floats(bytes), factor); }
};
struct E4m3Scales {
  static constexpr int kShift = 20;
  static constexpr uint8_t kFirst = 8, kLast = 0x7E;  // positive normal numbers
  __m512 unit, global, factor;
  bool moderate;

  // Where no step leaves the normal numbers, powers of two may be multiplied first: `unit`, and that by which a float
  // with E4M3's exponent is too small.
  E4m3Scales(float unit, float global)
      : unit(_mm512_set1_ps(unit)),
        global(_mm512_set1_ps(global)),
        factor(_mm512_set1_ps(global * unit * 0x1p120f)),
        moderate(global >= 0x1p-100f && global < 0x1p8f && global * unit >= 0x1p-100f && global * unit < 0x1p8f) {}
  __m512 any(__m512i bytes) const { return _mm512_mul_ps(_mm512_mul_ps(e4m3_to_floats(bytes), global), unit); }
};

// Whether all bytes of 4 vectors are ordinary, and may be treated as such.
template <class Scales>
static inline bool are_ordinary(const Scales& scales, const __m512 (&z)[4]) {
  __m512i highest = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i above = _mm512_sub_epi8(_mm512_castps_si512(z[i]), _mm512_set1_epi8(Scales::kFirst));
    highest = _mm512_max_epu8(highest, above);
  }
  const __m512i span = _mm512_set1_epi8(static_cast<char>(Scales::kLast - Scales::kFirst));
  return scales.moderate && _mm512_cmpgt_epu8_mask(highest, span) == 0;
}

// Ordinary bytes whose bits have been moved to kShift.
template <class Scales>
static inline __m512 ordinary_floats(const Scales& scales, __m512i bits) {
  const __m512i mask = _mm512_set1_epi32(0xFFu << Scales::kShift & 0x7FFFFFFFu);
  return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(bits, mask)), scales.factor);
}

// A step of 16 bytes a row to floats [16][16].
template <class Scales>
static inline void expand_step(const Scales& scales, const __m512 (&z)[4], float* out) {
  constexpr int shift = Scales::kShift;
  const auto store = [&](int group, __m512 floats) { _mm512_storeu_ps(out + group * kTileRows, floats); };
  if (are_ordinary(scales, z)) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i bytes = _mm512_castps_si512(z[i]);
      store(4 * i, ordinary_floats(scales, _mm512_slli_epi32(bytes, shift)));
      store(4 * i + 1, ordinary_floats(scales, _mm512_slli_epi32(bytes, shift - 8)));
      store(4 * i + 2, ordinary_floats(scales, _mm512_slli_epi32(bytes, shift - 16)));
      store(4 * i + 3, ordinary_floats(scales, _mm512_srli_epi32(bytes, 24 - shift)));
    }
    return;
  }
  for (int i = 0; i < 16; ++i) {
    const __m512i shifted = _mm512_srlv_epi32(_mm512_castps_si512(z[i / 4]), _mm512_set1_epi32(i % 4 * 8));
    store(i, scales.any(shifted));
  }
}

// 16 bytes of each row of a tile from a column on, as load_step has them. Rows past n repeat the last one.
[[gnu::always_inline]] static inline void load_tile_step(const char* scale, int64_t stride, int64_t n, int64_t tile,
                                                         int64_t column, __m512 (&z)[4]) {
  const char* rows = scale + tile * kTileRows * stride + column;
  const int64_t last = n - 1 - tile * kTileRows;
  if (last >= kTileRows - 1) return load_step(rows, stride, z);
  char copy[kTileRows][16];
  for (int64_t i = 0; i < kTileRows; ++i) std::memcpy(copy[i], rows + (i < last ? i : last) * stride, 16);
  load_step(copy[0], 16, z);
}

// The scales of a tile's 16 rows times `unit` to floats [groups][16]. Lanes past n repeat the last row.
static inline void expand_scales(const Fp4Weight& w, int64_t groups, int64_t tile, float unit, float* out) {
  const int64_t step = w.scale ? 4 : 16;  // groups in 16 bytes of a row
  if (groups < step) {
    const int64_t first = tile * kTileRows, last = w.n - 1 - first;
    for (int64_t i = 0; i < groups * kTileRows; ++i) {
      const int64_t lane = i % kTileRows < last ? i % kTileRows : last;
      out[i] = weight_scale(w, (first + lane) * groups + i / kTileRows) * unit;
    }
    return;
  }
  const auto each_step = [&](const auto* scale, const auto& expand) {
    constexpr int64_t size = sizeof(*scale);
    for (int64_t next = 0; next < groups; next += step) {
      const int64_t group = next + step <= groups ? next : groups - step;  // the last ones overlap
      __m512 z[4];
      load_tile_step(reinterpret_cast<const char*>(scale), groups * size, w.n, tile, group * size, z);
      expand(z, out + group * kTileRows);
    }
  };
  if (w.global_scale) {
    const E4m3Scales scales(unit, *w.global_scale);
    return each_step(w.scale_bytes, [&](const __m512(&z)[4], float* to) { expand_step(scales, z, to); });
  }
  if (w.scale_bytes) {
    const E8m0Scales scales(unit);
    return each_step(w.scale_bytes, [&](const __m512(&z)[4], float* to) { expand_step(scales, z, to); });
  }
  each_step(w.scale, [&](const __m512(&z)[4], float* to) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_ps(to + i * kTileRows, _mm512_mul_ps(z[i], _mm512_set1_ps(unit)));
  });
}

// Asks for the scales of a tile, which lie together.
static inline void prefetch_scales(const Fp4Weight& w, int64_t groups, int64_t tile) {
  const int64_t size = w.scale ? 4 : 1, first = tile * kTileRows * groups * size;
  const char* scale = w.scale ? reinterpret_cast<const char*>(w.scale) : reinterpret_cast<const char*>(w.scale_bytes);
  for (int64_t i = 0; i < kTileRows * groups * size; i += 64) _mm_prefetch(scale + first + i, _MM_HINT_T1);
}

}  // namespace bitmill::detail
