// SPDX-License-Identifier: Apache-2.0
// AVX2's vectors and operations by those of NEON, two registers of 128 bits for one of 256, with the same results to
// the bit, so that the kernels in *_avx2.cpp serve aarch64 too. Here is what they use, no more; an operation whose
// lanes of 128 bits do not meet is written for one of them and made for two.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

using __m128 = float32x4_t;
using __m128i = int32x4_t;
struct __m256 {
  float32x4_t low, high;
};
struct __m256i {
  int32x4_t low, high;
};

namespace bitmill::neon {

template <class To, class From>
static inline To as(From x) {
  return __builtin_bit_cast(To, x);
}

}  // namespace bitmill::neon

// name: what follows _mm_ and _mm256_. type: the lanes that `operation` takes.
#define BITMILL_INTEGERS(name, type, operation)                                \
  static inline __m128i _mm_##name(__m128i x, __m128i y) {                     \
    const type a = bitmill::neon::as<type>(x), b = bitmill::neon::as<type>(y); \
    return bitmill::neon::as<__m128i>(operation);                              \
  }                                                                            \
  static inline __m256i _mm256_##name(__m256i x, __m256i y) {                  \
    return {_mm_##name(x.low, y.low), _mm_##name(x.high, y.high)};             \
  }
#define BITMILL_FLOATS(name, operation)                                          \
  static inline __m128 _mm_##name##_ps(__m128 a, __m128 b) { return operation; } \
  static inline __m256 _mm256_##name##_ps(__m256 x, __m256 y) {                  \
    return {_mm_##name##_ps(x.low, y.low), _mm_##name##_ps(x.high, y.high)};     \
  }
#define BITMILL_SHIFTS(name, bits, signed_type, type)                                                 \
  static inline __m128i _mm_slli_##name(__m128i x, int count) {                                       \
    return bitmill::neon::as<__m128i>(                                                                \
        vshlq_u##bits(bitmill::neon::as<type>(x), vdupq_n_s##bits(static_cast<signed_type>(count)))); \
  }                                                                                                   \
  static inline __m128i _mm_srli_##name(__m128i x, int count) { return _mm_slli_##name(x, -count); }  \
  static inline __m256i _mm256_slli_##name(__m256i x, int count) {                                    \
    return {_mm_slli_##name(x.low, count), _mm_slli_##name(x.high, count)};                           \
  }                                                                                                   \
  static inline __m256i _mm256_srli_##name(__m256i x, int count) { return _mm256_slli_##name(x, -count); }

// Logic.

BITMILL_INTEGERS(and_si128, int32x4_t, vandq_s32(a, b))
BITMILL_INTEGERS(or_si128, int32x4_t, vorrq_s32(a, b))
BITMILL_INTEGERS(xor_si128, int32x4_t, veorq_s32(a, b))
BITMILL_INTEGERS(andnot_si128, int32x4_t, vbicq_s32(b, a))
static inline __m256i _mm256_and_si256(__m256i a, __m256i b) { return _mm256_and_si128(a, b); }
static inline __m256i _mm256_or_si256(__m256i a, __m256i b) { return _mm256_or_si128(a, b); }
static inline __m256i _mm256_xor_si256(__m256i a, __m256i b) { return _mm256_xor_si128(a, b); }
static inline __m256i _mm256_andnot_si256(__m256i a, __m256i b) { return _mm256_andnot_si128(a, b); }

static inline __m256i _mm256_castps_si256(__m256 x) {
  return {vreinterpretq_s32_f32(x.low), vreinterpretq_s32_f32(x.high)};
}
static inline __m256 _mm256_castsi256_ps(__m256i x) {
  return {vreinterpretq_f32_s32(x.low), vreinterpretq_f32_s32(x.high)};
}
static inline __m256 _mm256_and_ps(__m256 a, __m256 b) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
static inline __m256 _mm256_or_ps(__m256 a, __m256 b) {
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
static inline __m256 _mm256_xor_ps(__m256 a, __m256 b) {
  return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
static inline __m256 _mm256_andnot_ps(__m256 a, __m256 b) {
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

// Integers.

BITMILL_INTEGERS(add_epi8, int8x16_t, vaddq_s8(a, b))
BITMILL_INTEGERS(add_epi16, int16x8_t, vaddq_s16(a, b))
BITMILL_INTEGERS(add_epi32, int32x4_t, vaddq_s32(a, b))
BITMILL_INTEGERS(add_epi64, int64x2_t, vaddq_s64(a, b))
BITMILL_INTEGERS(sub_epi8, int8x16_t, vsubq_s8(a, b))
BITMILL_INTEGERS(sub_epi16, int16x8_t, vsubq_s16(a, b))
BITMILL_INTEGERS(sub_epi32, int32x4_t, vsubq_s32(a, b))
BITMILL_INTEGERS(subs_epu16, uint16x8_t, vqsubq_u16(a, b))
BITMILL_INTEGERS(max_epi8, int8x16_t, vmaxq_s8(a, b))
BITMILL_INTEGERS(max_epu8, uint8x16_t, vmaxq_u8(a, b))
BITMILL_INTEGERS(max_epu32, uint32x4_t, vmaxq_u32(a, b))
BITMILL_INTEGERS(min_epu8, uint8x16_t, vminq_u8(a, b))
BITMILL_INTEGERS(min_epu16, uint16x8_t, vminq_u16(a, b))
BITMILL_INTEGERS(min_epu32, uint32x4_t, vminq_u32(a, b))
BITMILL_INTEGERS(cmpeq_epi8, int8x16_t, vceqq_s8(a, b))
BITMILL_INTEGERS(cmpeq_epi16, int16x8_t, vceqq_s16(a, b))
BITMILL_INTEGERS(cmpeq_epi32, int32x4_t, vceqq_s32(a, b))
BITMILL_INTEGERS(cmpgt_epi16, int16x8_t, vcgtq_s16(a, b))
BITMILL_INTEGERS(cmpgt_epi32, int32x4_t, vcgtq_s32(a, b))
// a where b > 0, -a where b < 0, 0 where b = 0.
BITMILL_INTEGERS(sign_epi32, int32x4_t,
                 vbicq_s32(vbslq_s32(vcltzq_s32(b), vnegq_s32(a), a), vreinterpretq_s32_u32(vceqzq_s32(b))))
BITMILL_INTEGERS(mul_epu32, uint64x2_t, vmull_u32(vmovn_u64(a), vmovn_u64(b)))
BITMILL_INTEGERS(madd_epi16, int16x8_t, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)))
// Bytes of a without sign, of b with it; sums of two that saturate.
static inline __m128i _mm_maddubs_epi16(__m128i x, __m128i y) {
  const uint8x16_t a = vreinterpretq_u8_s32(x);
  const int8x16_t b = vreinterpretq_s8_s32(y);
  const int16x8_t low = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(a))), vmovl_s8(vget_low_s8(b)));
  const int16x8_t high = vmulq_s16(vreinterpretq_s16_u16(vmovl_high_u8(a)), vmovl_high_s8(b));
  return vreinterpretq_s32_s16(vqaddq_s16(vuzp1q_s16(low, high), vuzp2q_s16(low, high)));
}
static inline __m256i _mm256_maddubs_epi16(__m256i x, __m256i y) {
  return {_mm_maddubs_epi16(x.low, y.low), _mm_maddubs_epi16(x.high, y.high)};
}
// Sums of 8 distances, as 64 bits.
BITMILL_INTEGERS(sad_epu8, uint8x16_t, vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(vabdq_u8(a, b)))))
static inline __m256i _mm256_abs_epi8(__m256i x) {
  return {vreinterpretq_s32_s8(vabsq_s8(vreinterpretq_s8_s32(x.low))),
          vreinterpretq_s32_s8(vabsq_s8(vreinterpretq_s8_s32(x.high)))};
}

BITMILL_SHIFTS(epi16, 16, int16_t, uint16x8_t)
BITMILL_SHIFTS(epi32, 32, int32_t, uint32x4_t)
BITMILL_SHIFTS(epi64, 64, int64_t, uint64x2_t)
static inline __m256i _mm256_sll_epi32(__m256i x, __m128i count) { return _mm256_slli_epi32(x, count[0]); }
static inline __m256i _mm256_srl_epi32(__m256i x, __m128i count) { return _mm256_srli_epi32(x, count[0]); }
static inline __m256i _mm256_srl_epi16(__m256i x, __m128i count) { return _mm256_srli_epi16(x, count[0]); }
// NEON takes the lowest byte of a count as signed, AVX2 a count above 31 as 32.
BITMILL_INTEGERS(sllv_epi32, uint32x4_t, vshlq_u32(a, vreinterpretq_s32_u32(vminq_u32(b, vdupq_n_u32(32)))))
BITMILL_INTEGERS(srlv_epi32, uint32x4_t, vshlq_u32(a, vnegq_s32(vreinterpretq_s32_u32(vminq_u32(b, vdupq_n_u32(32))))))

// Order.

BITMILL_INTEGERS(unpacklo_epi8, int8x16_t, vzip1q_s8(a, b))
BITMILL_INTEGERS(unpackhi_epi8, int8x16_t, vzip2q_s8(a, b))
BITMILL_INTEGERS(unpacklo_epi16, int16x8_t, vzip1q_s16(a, b))
BITMILL_INTEGERS(unpackhi_epi16, int16x8_t, vzip2q_s16(a, b))
BITMILL_INTEGERS(unpacklo_epi32, int32x4_t, vzip1q_s32(a, b))
BITMILL_INTEGERS(unpackhi_epi32, int32x4_t, vzip2q_s32(a, b))
BITMILL_INTEGERS(unpacklo_epi64, int64x2_t, vzip1q_s64(a, b))
BITMILL_INTEGERS(unpackhi_epi64, int64x2_t, vzip2q_s64(a, b))
BITMILL_INTEGERS(packs_epi16, int16x8_t, vqmovn_high_s16(vqmovn_s16(a), b))
BITMILL_INTEGERS(packs_epi32, int32x4_t, vqmovn_high_s32(vqmovn_s32(a), b))
BITMILL_INTEGERS(packus_epi16, int16x8_t, vqmovun_high_s16(vqmovun_s16(a), b))
BITMILL_INTEGERS(packus_epi32, int32x4_t, vqmovun_high_s32(vqmovun_s32(a), b))
// Byte b & 15 of a, and 0 where bit 7 of b is set.
BITMILL_INTEGERS(shuffle_epi8, uint8x16_t, vqtbl1q_u8(a, vandq_u8(b, vdupq_n_u8(0x8F))))

static inline __m128i _mm_shuffle_epi32(__m128i x, int from) {
  return __m128i{x[from & 3], x[from >> 2 & 3], x[from >> 4 & 3], x[from >> 6 & 3]};
}
static inline __m256i _mm256_shuffle_epi32(__m256i x, int from) {
  return {_mm_shuffle_epi32(x.low, from), _mm_shuffle_epi32(x.high, from)};
}
static inline __m128 _mm_shuffle_ps(__m128 a, __m128 b, int from) {
  return __m128{a[from & 3], a[from >> 2 & 3], b[from >> 4 & 3], b[from >> 6 & 3]};
}
static inline __m256 _mm256_shuffle_ps(__m256 a, __m256 b, int from) {
  return {_mm_shuffle_ps(a.low, b.low, from), _mm_shuffle_ps(a.high, b.high, from)};
}
BITMILL_FLOATS(unpacklo, vzip1q_f32(a, b))
BITMILL_FLOATS(unpackhi, vzip2q_f32(a, b))
static inline __m128 _mm_movehl_ps(__m128 a, __m128 b) { return __m128{b[2], b[3], a[2], a[3]}; }
static inline __m128 _mm_movehdup_ps(__m128 x) { return __m128{x[1], x[1], x[3], x[3]}; }

static inline __m256i _mm256_permute2x128_si256(__m256i a, __m256i b, int from) {
  const __m128i half[4] = {a.low, a.high, b.low, b.high};
  return {half[from & 3], half[from >> 4 & 3]};
}
static inline __m256 _mm256_permute2f128_ps(__m256 a, __m256 b, int from) {
  const __m128 half[4] = {a.low, a.high, b.low, b.high};
  return {half[from & 3], half[from >> 4 & 3]};
}
static inline __m256i _mm256_permute4x64_epi64(__m256i x, int from) {
  const auto low = bitmill::neon::as<int64x2_t>(x.low), high = bitmill::neon::as<int64x2_t>(x.high);
  const int64_t quarter[4] = {low[0], low[1], high[0], high[1]};
  return {bitmill::neon::as<__m128i>(int64x2_t{quarter[from & 3], quarter[from >> 2 & 3]}),
          bitmill::neon::as<__m128i>(int64x2_t{quarter[from >> 4 & 3], quarter[from >> 6 & 3]})};
}
static inline __m256i _mm256_permutevar8x32_epi32(__m256i x, __m256i from) {
  const uint8x16x2_t bytes = {vreinterpretq_u8_s32(x.low), vreinterpretq_u8_s32(x.high)};
  const auto chosen = [&](int32x4_t index) {
    const uint32x4_t lane = vandq_u32(vreinterpretq_u32_s32(index), vdupq_n_u32(7));
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100), lane, vdupq_n_u32(0x04040404));
    return vreinterpretq_s32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_u32(at)));
  };
  return {chosen(from.low), chosen(from.high)};
}
static inline __m256 _mm256_permutevar8x32_ps(__m256 x, __m256i from) {
  return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(_mm256_castps_si256(x), from));
}
// Of the same four.
static inline __m256 _mm256_permutevar_ps(__m256 x, __m256i from) {
  const auto chosen = [](float32x4_t four, int32x4_t index) {
    const uint32x4_t lane = vandq_u32(vreinterpretq_u32_s32(index), vdupq_n_u32(3));
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100), lane, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(four), vreinterpretq_u8_u32(at)));
  };
  return {chosen(x.low, from.low), chosen(x.high, from.high)};
}

// b where the highest bit of a mask's byte, or float, is set.
static inline __m128i _mm_blendv_epi8(__m128i a, __m128i b, __m128i mask) {
  return vreinterpretq_s32_u8(
      vbslq_u8(vcltzq_s8(vreinterpretq_s8_s32(mask)), vreinterpretq_u8_s32(b), vreinterpretq_u8_s32(a)));
}
static inline __m256i _mm256_blendv_epi8(__m256i a, __m256i b, __m256i mask) {
  return {_mm_blendv_epi8(a.low, b.low, mask.low), _mm_blendv_epi8(a.high, b.high, mask.high)};
}
static inline __m256 _mm256_blendv_ps(__m256 a, __m256 b, __m256 mask) {
  return {vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(mask.low)), b.low, a.low),
          vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(mask.high)), b.high, a.high)};
}
static inline __m256i _mm256_blend_epi32(__m256i a, __m256i b, int from_b) {
  const auto chosen = [](__m128i x, __m128i y, int bits) {
    return __m128i{bits & 1 ? y[0] : x[0], bits & 2 ? y[1] : x[1], bits & 4 ? y[2] : x[2], bits & 8 ? y[3] : x[3]};
  };
  return {chosen(a.low, b.low, from_b), chosen(a.high, b.high, from_b >> 4)};
}

// The highest bits of floats, or bytes.
static inline int _mm256_movemask_ps(__m256 x) {
  const uint32x4_t low = vshrq_n_u32(vreinterpretq_u32_f32(x.low), 31);
  const uint32x4_t high = vshrq_n_u32(vreinterpretq_u32_f32(x.high), 31);
  const int32x4_t at_low = {0, 1, 2, 3}, at_high = {4, 5, 6, 7};
  return static_cast<int>(vaddvq_u32(vorrq_u32(vshlq_u32(low, at_low), vshlq_u32(high, at_high))));
}
static inline int _mm256_movemask_epi8(__m256i x) {
  const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const auto bits = [&](int32x4_t half) {
    const uint8x16_t set = vandq_u8(vcltzq_s8(vreinterpretq_s8_s32(half)), bit);
    return static_cast<uint32_t>(vaddv_u8(vget_low_u8(set))) | static_cast<uint32_t>(vaddv_u8(vget_high_u8(set))) << 8;
  };
  return static_cast<int>(bits(x.low) | bits(x.high) << 16);
}

// Floats.

BITMILL_FLOATS(add, vaddq_f32(a, b))
BITMILL_FLOATS(sub, vsubq_f32(a, b))
BITMILL_FLOATS(mul, vmulq_f32(a, b))
BITMILL_FLOATS(div, vdivq_f32(a, b))
static inline __m256 _mm256_sqrt_ps(__m256 x) { return {vsqrtq_f32(x.low), vsqrtq_f32(x.high)}; }
// The second where they are equal or one is NaN.
BITMILL_FLOATS(min, vbslq_f32(vcltq_f32(a, b), a, b))
BITMILL_FLOATS(max, vbslq_f32(vcgtq_f32(a, b), a, b))
static inline __m256 _mm256_fmadd_ps(__m256 a, __m256 b, __m256 c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
static inline __m256 _mm256_fmsub_ps(__m256 a, __m256 b, __m256 c) {
  return _mm256_fmadd_ps(a, b, {vnegq_f32(c.low), vnegq_f32(c.high)});
}
static inline __m256 _mm256_fnmadd_ps(__m256 a, __m256 b, __m256 c) {
  return {vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)};
}
static inline __m128 _mm_add_ss(__m128 a, __m128 b) { return vsetq_lane_f32(a[0] + b[0], a, 0); }

enum { _CMP_LT_OQ, _CMP_GT_OQ, _CMP_GE_OQ, _CMP_NEQ_OQ, _CMP_UNORD_Q };

static inline uint32x4_t _mm_cmp_bits(float32x4_t a, float32x4_t b, int predicate) {
  switch (predicate) {
    case _CMP_LT_OQ:
      return vcltq_f32(a, b);
    case _CMP_GT_OQ:
      return vcgtq_f32(a, b);
    case _CMP_GE_OQ:
      return vcgeq_f32(a, b);
    case _CMP_NEQ_OQ:
      return vorrq_u32(vcltq_f32(a, b), vcgtq_f32(a, b));
    default:
      return vmvnq_u32(vandq_u32(vceqq_f32(a, a), vceqq_f32(b, b)));
  }
}
static inline __m256 _mm256_cmp_ps(__m256 a, __m256 b, int predicate) {
  return {vreinterpretq_f32_u32(_mm_cmp_bits(a.low, b.low, predicate)),
          vreinterpretq_f32_u32(_mm_cmp_bits(a.high, b.high, predicate))};
}

// To other types.

static inline __m256 _mm256_cvtepi32_ps(__m256i x) { return {vcvtq_f32_s32(x.low), vcvtq_f32_s32(x.high)}; }
// What does not fit is 0x80000000.
static inline __m256i _mm256_cvtps_epi32(__m256 x) {
  const auto convert = [](float32x4_t z) {
    return vbslq_s32(vcaltq_f32(z, vdupq_n_f32(0x1p31f)), vcvtnq_s32_f32(z), vdupq_n_s32(INT32_MIN));
  };
  return {convert(x.low), convert(x.high)};
}
static inline __m256i _mm256_cvttps_epi32(__m256 x) {
  const auto convert = [](float32x4_t z) {
    return vbslq_s32(vcaltq_f32(z, vdupq_n_f32(0x1p31f)), vcvtq_s32_f32(z), vdupq_n_s32(INT32_MIN));
  };
  return {convert(x.low), convert(x.high)};
}
enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };
static inline __m256 _mm256_cvtph_ps(__m128i x) {
  const float16x8_t halves = vreinterpretq_f16_s32(x);
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
static inline __m128i _mm256_cvtps_ph(__m256 x, int) {  // to nearest even, as ever
  return vreinterpretq_s32_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high));
}

static inline __m128i _mm_cvtepi8_epi16(__m128i x) {
  return vreinterpretq_s32_s16(vmovl_s8(vget_low_s8(vreinterpretq_s8_s32(x))));
}
static inline __m128i _mm_cvtepu8_epi16(__m128i x) {
  return vreinterpretq_s32_u16(vmovl_u8(vget_low_u8(vreinterpretq_u8_s32(x))));
}
static inline __m256i _mm256_cvtepi8_epi16(__m128i x) {
  return {_mm_cvtepi8_epi16(x), vreinterpretq_s32_s16(vmovl_high_s8(vreinterpretq_s8_s32(x)))};
}
static inline __m256i _mm256_cvtepu8_epi16(__m128i x) {
  return {_mm_cvtepu8_epi16(x), vreinterpretq_s32_u16(vmovl_high_u8(vreinterpretq_u8_s32(x)))};
}
static inline __m256i _mm256_cvtepi16_epi32(__m128i x) {
  const int16x8_t halves = vreinterpretq_s16_s32(x);
  return {vmovl_s16(vget_low_s16(halves)), vmovl_high_s16(halves)};
}
static inline __m256i _mm256_cvtepu16_epi32(__m128i x) {
  const uint16x8_t halves = vreinterpretq_u16_s32(x);
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(halves))), vreinterpretq_s32_u32(vmovl_high_u16(halves))};
}
static inline __m256i _mm256_cvtepi8_epi32(__m128i x) { return _mm256_cvtepi16_epi32(_mm_cvtepi8_epi16(x)); }
static inline __m256i _mm256_cvtepu8_epi32(__m128i x) { return _mm256_cvtepu16_epi32(_mm_cvtepu8_epi16(x)); }

// Halves and single values.

static inline __m128 _mm256_castps256_ps128(__m256 x) { return x.low; }
static inline __m128i _mm256_castsi256_si128(__m256i x) { return x.low; }
static inline __m256 _mm256_castps128_ps256(__m128 x) { return {x, vdupq_n_f32(0.0f)}; }
static inline __m128 _mm256_extractf128_ps(__m256 x, int half) { return half ? x.high : x.low; }
static inline __m128i _mm256_extracti128_si256(__m256i x, int half) { return half ? x.high : x.low; }
static inline __m256 _mm256_insertf128_ps(__m256 x, __m128 y, int half) {
  return half ? __m256{x.low, y} : __m256{y, x.high};
}
static inline __m256 _mm256_set_m128(__m128 high, __m128 low) { return {low, high}; }
static inline __m256i _mm256_broadcastsi128_si256(__m128i x) { return {x, x}; }

static inline int _mm_cvtsi128_si32(__m128i x) { return x[0]; }
static inline int64_t _mm_extract_epi64(__m128i x, int i) { return vreinterpretq_s64_s32(x)[i]; }
static inline int64_t _mm_cvtsi128_si64(__m128i x) { return _mm_extract_epi64(x, 0); }
static inline int _mm_extract_epi16(__m128i x, int i) { return vreinterpretq_u16_s32(x)[i]; }
static inline float _mm_cvtss_f32(__m128 x) { return x[0]; }
static inline __m128i _mm_cvtsi32_si128(int x) { return __m128i{x, 0, 0, 0}; }
static inline __m128i _mm_cvtsi64_si128(int64_t x) { return bitmill::neon::as<__m128i>(int64x2_t{x, 0}); }
static inline __m128i _mm_srli_si128(__m128i x, int bytes) {
  const uint8x16_t at = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const uint8x16_t from = vaddq_u8(at, vdupq_n_u8(static_cast<uint8_t>(bytes)));
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(x), from));
}
// The smallest of 8, and behind it where it is first.
static inline __m128i _mm_minpos_epu16(__m128i x) {
  const uint16x8_t values = vreinterpretq_u16_s32(x), at = {0, 1, 2, 3, 4, 5, 6, 7};
  const uint16_t least = vminvq_u16(values);
  const uint16x8_t places = vorrq_u16(at, vmvnq_u16(vceqq_u16(values, vdupq_n_u16(least))));
  return vreinterpretq_s32_u16(uint16x8_t{least, vminvq_u16(places)});
}
static inline int _mm_popcnt_u32(uint32_t x) { return __builtin_popcount(x); }

static inline __m128i _mm_setzero_si128() { return vdupq_n_s32(0); }
static inline __m256i _mm256_setzero_si256() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline __m256 _mm256_setzero_ps() { return {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}; }
static inline __m256 _mm256_set1_ps(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
static inline __m128i _mm_set1_epi8(char x) { return vreinterpretq_s32_u8(vdupq_n_u8(static_cast<uint8_t>(x))); }
static inline __m128i _mm_set1_epi16(int16_t x) { return vreinterpretq_s32_s16(vdupq_n_s16(x)); }
static inline __m256i _mm256_set1_epi8(char x) { return {_mm_set1_epi8(x), _mm_set1_epi8(x)}; }
static inline __m256i _mm256_set1_epi16(int16_t x) { return {_mm_set1_epi16(x), _mm_set1_epi16(x)}; }
static inline __m256i _mm256_set1_epi32(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
static inline __m256i _mm256_set1_epi64x(int64_t x) {
  const int32x4_t both = vreinterpretq_s32_s64(vdupq_n_s64(x));
  return {both, both};
}
static inline __m256 _mm256_setr_ps(float a, float b, float c, float d, float e, float f, float g, float h) {
  return {float32x4_t{a, b, c, d}, float32x4_t{e, f, g, h}};
}
static inline __m256i _mm256_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h) {
  return {int32x4_t{a, b, c, d}, int32x4_t{e, f, g, h}};
}
template <class... Bytes>
static inline __m128i _mm_setr_epi8(Bytes... x) {
  const int8_t lanes[16] = {static_cast<int8_t>(x)...};
  return vreinterpretq_s32_s8(vld1q_s8(lanes));
}
template <class... Bytes>
static inline __m256i _mm256_setr_epi8(Bytes... x) {
  const int8_t lanes[32] = {static_cast<int8_t>(x)...};
  return {vreinterpretq_s32_s8(vld1q_s8(lanes)), vreinterpretq_s32_s8(vld1q_s8(lanes + 16))};
}
template <class... Halves>
static inline __m256i _mm256_setr_epi16(Halves... x) {
  const int16_t lanes[16] = {static_cast<int16_t>(x)...};
  return {vreinterpretq_s32_s16(vld1q_s16(lanes)), vreinterpretq_s32_s16(vld1q_s16(lanes + 8))};
}

// Memory.

static inline __m128 _mm_loadu_ps(const float* p) { return vld1q_f32(p); }
static inline __m128 _mm_load_ss(const float* p) { return vsetq_lane_f32(*p, vdupq_n_f32(0.0f), 0); }
static inline __m128i _mm_loadu_si128(const __m128i* p) {
  return vreinterpretq_s32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p)));
}
static inline __m128i _mm_load_si128(const __m128i* p) { return _mm_loadu_si128(p); }
static inline __m128i _mm_loadl_epi64(const __m128i* p) {
  int64_t low;
  std::memcpy(&low, p, sizeof low);
  return _mm_cvtsi64_si128(low);
}
static inline void _mm_storeu_si128(__m128i* p, __m128i x) {
  vst1q_u8(reinterpret_cast<uint8_t*>(p), vreinterpretq_u8_s32(x));
}
static inline void _mm_storel_epi64(__m128i* p, __m128i x) {
  const int64_t low = _mm_cvtsi128_si64(x);
  std::memcpy(p, &low, sizeof low);
}
static inline __m256 _mm256_loadu_ps(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline __m256 _mm256_load_ps(const float* p) { return _mm256_loadu_ps(p); }
static inline __m256 _mm256_broadcast_ss(const float* p) { return _mm256_set1_ps(*p); }
static inline void _mm256_storeu_ps(float* p, __m256 x) { vst1q_f32(p, x.low), vst1q_f32(p + 4, x.high); }
static inline void _mm256_store_ps(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
static inline __m256i _mm256_loadu_si256(const __m256i* p) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(p);
  return {vreinterpretq_s32_u8(vld1q_u8(bytes)), vreinterpretq_s32_u8(vld1q_u8(bytes + 16))};
}
static inline __m256i _mm256_load_si256(const __m256i* p) { return _mm256_loadu_si256(p); }
static inline void _mm256_storeu_si256(__m256i* p, __m256i x) {
  auto* bytes = reinterpret_cast<uint8_t*>(p);
  vst1q_u8(bytes, vreinterpretq_u8_s32(x.low)), vst1q_u8(bytes + 16, vreinterpretq_u8_s32(x.high));
}
static inline void _mm256_store_si256(__m256i* p, __m256i x) { _mm256_storeu_si256(p, x); }
// Only what a mask's highest bits choose is read.
static inline __m256i _mm256_maskload_epi32(const int* p, __m256i mask) {
  const auto four = [](const int* from, int32x4_t chosen) {
    return int32x4_t{chosen[0] < 0 ? from[0] : 0, chosen[1] < 0 ? from[1] : 0, chosen[2] < 0 ? from[2] : 0,
                     chosen[3] < 0 ? from[3] : 0};
  };
  return {four(p, mask.low), four(p + 4, mask.high)};
}
static inline __m256 _mm256_maskload_ps(const float* p, __m256i mask) {
  const auto four = [](const float* from, int32x4_t chosen) {
    return float32x4_t{chosen[0] < 0 ? from[0] : 0.0f, chosen[1] < 0 ? from[1] : 0.0f, chosen[2] < 0 ? from[2] : 0.0f,
                       chosen[3] < 0 ? from[3] : 0.0f};
  };
  return {four(p, mask.low), four(p + 4, mask.high)};
}
static inline __m256 _mm256_i32gather_ps(const float* p, __m256i index, int) {  // of floats: 4 bytes each
  const auto four = [&](int32x4_t i) { return float32x4_t{p[i[0]], p[i[1]], p[i[2]], p[i[3]]}; };
  return {four(index.low), four(index.high)};
}
// Plain stores: nothing like theirs has an intrinsic on NEON.
static inline void _mm_stream_si128(__m128i* p, __m128i x) { _mm_storeu_si128(p, x); }
static inline void _mm256_stream_ps(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
static inline void _mm_sfence() {}
enum { _MM_HINT_T0 };
static inline void _mm_prefetch(const char* p, int) { __builtin_prefetch(p); }

// What avx2.h has in assembly.

namespace bitmill::detail {

[[gnu::always_inline]] static inline void settle(__m256& x) { asm volatile("" : "+w"(x.low), "+w"(x.high)); }
[[gnu::always_inline]] static inline void settle(__m256i& x) { asm volatile("" : "+w"(x.low), "+w"(x.high)); }
static inline __m256i broadcast(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm256_set1_epi32(word);
}
static inline __m256 broadcast_four(const float* p) { return {vld1q_f32(p), vld1q_f32(p)}; }
template <int lane>
static inline void insert(__m128& v, const float* p) {
  v = vld1q_lane_f32(p, v, lane);
}

}  // namespace bitmill::detail

#undef BITMILL_INTEGERS
#undef BITMILL_FLOATS
#undef BITMILL_SHIFTS
