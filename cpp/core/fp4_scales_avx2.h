// SPDX-License-Identifier: Apache-2.0
// Scales of FP4 weights with AVX2: those of a tile's rows side by side, E8M0 and E4M3 bytes as floats.
#pragma once

#include <cstring>

#include "avx2.h"
#include "fp4.h"
#include "layout.h"

namespace bitmill::detail {

// Kinds of scale bytes. `any` makes floats of lanes of 0 ... 255, times a unit, a power of two. Ordinary bytes, kFirst
// to kLast, need no more than their bits at kShift and a product with `factor`, if the numbers are moderate.
struct E8m0Scales {
  static constexpr int kShift = 23;
  static constexpr uint8_t kFirst = 1, kLast = 254;  // all but NaN and a subnormal number
  static constexpr bool moderate = true;
  __m256 factor;

  explicit E8m0Scales(float unit) : factor(_mm256_set1_ps(unit)) {}
  __m256 any(__m256i bytes) const {
    // 0 and 255, and no others, are below 2 after 1 is added modulo 256; both have the highest bit of the mantissa.
    const __m256i next = _mm256_and_si256(_mm256_add_epi32(bytes, _mm256_set1_epi32(1)), _mm256_set1_epi32(0xFE));
    const __m256i special = _mm256_cmpeq_epi32(next, _mm256_setzero_si256());
    const __m256i half = _mm256_and_si256(special, _mm256_set1_epi32(0x400000));
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(bytes, 23), half)), factor);
  }
};
struct E4m3Scales {
  static constexpr int kShift = 20;
  static constexpr uint8_t kFirst = 8, kLast = 0x7E;  // positive normal numbers
  __m256 unit, global, factor;
  bool moderate;

  // Where no step leaves the normal numbers, powers of two may be multiplied first: `unit`, and that by which a float
  // with E4M3's exponent is too small.
  E4m3Scales(float unit, float global)
      : unit(_mm256_set1_ps(unit)),
        global(_mm256_set1_ps(global)),
        factor(_mm256_set1_ps(global * unit * 0x1p120f)),
        moderate(global >= 0x1p-100f && global < 0x1p8f && global * unit >= 0x1p-100f && global * unit < 0x1p8f) {}
  __m256 any(__m256i bytes) const {
    const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi32(0x7F));
    const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
    const __m256 subnormal = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
    const __m256 small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude));
    const __m256i value = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(normal), subnormal, small));
    const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F));
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(bytes, 24), _mm256_set1_epi32(INT32_MIN));
    const __m256i more = _mm256_or_si256(sign, _mm256_and_si256(nan, _mm256_set1_epi32(0x7FC00000)));
    return _mm256_mul_ps(_mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(value, more)), global), unit);
  }
};

// Whether all bytes of 4 vectors are ordinary, and may be treated as such.
template <class Scales>
static inline bool are_ordinary(const Scales& scales, const __m256i (&z)[4]) {
  __m256i highest = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i)
    highest = _mm256_max_epu8(highest, _mm256_sub_epi8(z[i], _mm256_set1_epi8(Scales::kFirst)));
  const __m256i span = _mm256_set1_epi8(static_cast<char>(Scales::kLast - Scales::kFirst));
  const __m256i within = _mm256_cmpeq_epi8(_mm256_max_epu8(highest, span), span);
  return scales.moderate && _mm256_movemask_epi8(within) == -1;
}

// 16 bytes of each of 8 rows to dwords: z[i] has the i-th of every row.
static inline void load_rows(const uint8_t* const* rows, int64_t at, __m256i (&z)[4]) {
  const auto load = [&](int i) {
    const auto half = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(half(i)), half(i + 4), 1);
  };
  const __m256i a = load(0), b = load(1), c = load(2), d = load(3);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
  z[0] = _mm256_unpacklo_epi64(ab, cd);
  z[1] = _mm256_unpackhi_epi64(ab, cd);
  z[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
  z[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}

// 16 scales of each of 8 rows, times the unit: out[i * kTileRows + row].
template <class Scales>
static inline void expand_step(const Scales& scales, const __m256i (&z)[4], float* out) {
  constexpr int shift = Scales::kShift;
  if (are_ordinary(scales, z)) {
    const __m256i mask = _mm256_set1_epi32(0xFFu << shift & 0x7FFFFFFFu);
    const auto store = [&](int i, __m256i bits) {
      const __m256 value = _mm256_castsi256_ps(_mm256_and_si256(bits, mask));
      _mm256_storeu_ps(out + i * kTileRows, _mm256_mul_ps(value, scales.factor));
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(4 * i, _mm256_slli_epi32(z[i], shift));
      store(4 * i + 1, _mm256_slli_epi32(z[i], shift - 8));
      store(4 * i + 2, _mm256_slli_epi32(z[i], shift - 16));
      store(4 * i + 3, _mm256_srli_epi32(z[i], 24 - shift));
    }
    return;
  }
  for (int i = 0; i < 16; ++i) {
    const __m256i bytes = _mm256_srlv_epi32(z[i / 4], _mm256_set1_epi32(i % 4 * 8));
    _mm256_storeu_ps(out + i * kTileRows, scales.any(_mm256_and_si256(bytes, _mm256_set1_epi32(0xFF))));
  }
}

// Floats that expand_scales writes: 16 groups at least.
static constexpr int64_t scale_count(int64_t groups) { return (groups < 16 ? 16 : groups) * kTileRows; }

template <class Scales>
static void expand_bytes(const Fp4Weight& w, int64_t groups, int64_t tile, const Scales& scales, float* out) {
  constexpr int64_t kStep = 16;
  for (int64_t half = 0; half < kTileRows; half += 8) {
    const uint8_t* rows[8];
    uint8_t few[8][kStep] = {};
    for (int i = 0; i < 8; ++i) {  // what rows past n hold does not matter
      const int64_t row = tile * kTileRows + half + i;
      rows[i] = w.scale_bytes + (row < w.n ? row : w.n - 1) * groups;
      if (groups < kStep) rows[i] = static_cast<uint8_t*>(std::memcpy(few[i], rows[i], static_cast<size_t>(groups)));
    }
    for (int64_t group = 0; group < groups; group += kStep) {  // the last step ends with the row
      const int64_t first = groups < kStep ? 0 : group + kStep <= groups ? group : groups - kStep;
      __m256i z[4];
      load_rows(rows, first, z);
      expand_step(scales, z, out + first * kTileRows + half);
    }
  }
}

// The scales of a tile's rows, times a unit: floats [groups][16].
static inline void expand_scales(const Fp4Weight& w, int64_t groups, int64_t tile, float unit, float* out) {
  if (w.global_scale) return expand_bytes(w, groups, tile, E4m3Scales(unit, *w.global_scale), out);
  if (w.scale_bytes) return expand_bytes(w, groups, tile, E8m0Scales(unit), out);
  for (int64_t i = 0; i < kTileRows; ++i) {
    const int64_t row = tile * kTileRows + i;
    const float* scale = w.scale + (row < w.n ? row : w.n - 1) * groups;
    for (int64_t group = 0; group < groups; ++group) out[group * kTileRows + i] = scale[group] * unit;
  }
}

}  // namespace bitmill::detail
