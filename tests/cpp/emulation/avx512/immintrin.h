// SPDX-License-Identifier: Apache-2.0
// AVX-512 for machines that have AVX2 alone: the instructions that cpp/core uses, as Intel's Software Developer's
// Manual describes them, so that those kernels are tested on such machines, too. It stands before the compiler's
// <immintrin.h>, which serves for everything narrower.
#pragma once

// What g++ would declare for vectors of 512 bits and for masks.
#define _AVX5124FMAPSINTRIN_H_INCLUDED
#define _AVX5124VNNIWINTRIN_H_INCLUDED
#define _AVX512BF16INTRIN_H_INCLUDED
#define _AVX512BF16VLINTRIN_H_INCLUDED
#define _AVX512BITALGINTRIN_H_INCLUDED
#define _AVX512BWINTRIN_H_INCLUDED
#define _AVX512CDINTRIN_H_INCLUDED
#define _AVX512DQINTRIN_H_INCLUDED
#define _AVX512ERINTRIN_H_INCLUDED
#define _AVX512FINTRIN_H_INCLUDED
#define _AVX512IFMAINTRIN_H_INCLUDED
#define _AVX512IFMAVLINTRIN_H_INCLUDED
#define _AVX512PFINTRIN_H_INCLUDED
#define _AVX512VBMI2VLINTRIN_H_INCLUDED
#define _AVX512VBMIINTRIN_H_INCLUDED
#define _AVX512VBMIVLINTRIN_H_INCLUDED
#define _AVX512VLBWINTRIN_H_INCLUDED
#define _AVX512VLDQINTRIN_H_INCLUDED
#define _AVX512VLINTRIN_H_INCLUDED
#define _AVX512VNNIVLINTRIN_H_INCLUDED
#define _AVX512VP2INTERSECTINTRIN_H_INCLUDED
#define _AVX512VP2INTERSECTVLINTRIN_H_INCLUDED
#define _AVX512VPOPCNTDQINTRIN_H_INCLUDED
#define _AVX512VPOPCNTDQVLINTRIN_H_INCLUDED
#define _AVXVNNIINTRIN_H_INCLUDED
#define _GFNIINTRIN_H_INCLUDED
#define _VPCLMULQDQINTRIN_H_INCLUDED
#define __AVX512FP16INTRIN_H_INCLUDED
#define __AVX512FP16VLINTRIN_H_INCLUDED
#define __AVX512VBMI2INTRIN_H_INCLUDED
#define __AVX512VNNIINTRIN_H_INCLUDED
#define __VAESINTRIN_H_INCLUDED
#include_next <immintrin.h>

#include "lanes.h"

// Barriers for g++'s scheduler name registers that this machine lacks. What computes something says __asm__.
#define asm(...)
#define volatile(...) ("")

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef double __m512d __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
using __mmask8 = uint8_t;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;

// Called, not copied: a kernel has thousands of them, and g++ takes a minute for a file of such copies.
#define EMULATED [[gnu::noinline]] inline

// Vectors from numbers and from memory.
#define EMULATED_SETS(suffix, V, T)                                            \
  EMULATED V _mm512_set1_##suffix(T x) {                                       \
    emulated::Lanes<T, V> out;                                                 \
    out.fill(x);                                                               \
    return std::bit_cast<V>(out);                                              \
  }                                                                            \
  template <class... Ts>                                                       \
  EMULATED V _mm512_setr_##suffix(Ts... values) {                              \
    return std::bit_cast<V>(emulated::Lanes<T, V>{static_cast<T>(values)...}); \
  }
EMULATED_SETS(ps, __m512, float)
EMULATED_SETS(pd, __m512d, double)
EMULATED_SETS(epi8, __m512i, int8_t)
EMULATED_SETS(epi16, __m512i, int16_t)
EMULATED_SETS(epi32, __m512i, int32_t)
EMULATED_SETS(epi64, __m512i, int64_t)
EMULATED __m512i _mm512_broadcast_i32x4(__m128i x) {
  return std::bit_cast<__m512i>(std::array<__m128i, 4>{x, x, x, x});
}

#define EMULATED_MEMORY(suffix, V)                                                    \
  EMULATED V _mm512_loadu_##suffix(const void* p) { return emulated::load<V>(p); }    \
  EMULATED V _mm512_load_##suffix(const void* p) {                                    \
    emulated::aligned(p);                                                             \
    return emulated::load<V>(p);                                                      \
  }                                                                                   \
  EMULATED void _mm512_storeu_##suffix(void* p, V v) { emulated::store(p, v); }       \
  EMULATED void _mm512_store_##suffix(void* p, V v) {                                 \
    emulated::aligned(p);                                                             \
    emulated::store(p, v);                                                            \
  }                                                                                   \
  EMULATED void _mm512_stream_##suffix(void* p, V v) { _mm512_store_##suffix(p, v); } \
  EMULATED V _mm512_setzero_##suffix() { return V{}; }
EMULATED_MEMORY(ps, __m512)
EMULATED_MEMORY(pd, __m512d)
EMULATED_MEMORY(si512, __m512i)

#define EMULATED_MASKED_MEMORY(width, suffix, V, T)                            \
  EMULATED V _mm##width##_maskz_loadu_##suffix(uint64_t mask, const void* p) { \
    return emulated::load_lanes<T, V>(mask, p);                                \
  }                                                                            \
  EMULATED void _mm##width##_mask_storeu_##suffix(void* p, uint64_t mask, V v) { emulated::store_lanes<T>(p, mask, v); }
EMULATED_MASKED_MEMORY(512, ps, __m512, float)
EMULATED_MASKED_MEMORY(512, epi8, __m512i, int8_t)
EMULATED_MASKED_MEMORY(512, epi16, __m512i, int16_t)
EMULATED_MASKED_MEMORY(512, epi32, __m512i, int32_t)
EMULATED_MASKED_MEMORY(256, epi8, __m256i, int8_t)
EMULATED_MASKED_MEMORY(256, epi16, __m256i, int16_t)
EMULATED_MASKED_MEMORY(, epi8, __m128i, int8_t)
EMULATED __m512 _mm512_mask_loadu_ps(__m512 other, __mmask16 mask, const void* p) {
  return emulated::select<float>(mask, emulated::load_lanes<float, __m512>(mask, p), other);
}

EMULATED __m512 _mm512_mask_i32gather_ps(__m512 other, __mmask16 mask, __m512i index, const void* base, int scale) {
  emulated::Lanes<float, __m512> out = emulated::lanes<float>(other);
  for (int i = 0; i < 16; ++i) {
    const int64_t at = int64_t{emulated::lanes<int32_t>(index)[i]} * scale;
    if (mask >> i & 1) out[i] = emulated::load<float>(static_cast<const char*>(base) + at);
  }
  return std::bit_cast<__m512>(out);
}
EMULATED __m512 _mm512_i32gather_ps(__m512i index, const void* base, int scale) {
  return _mm512_mask_i32gather_ps(__m512{}, 0xFFFF, index, base, scale);
}

// Arithmetic that AVX2 has, too.
#define EMULATED_BY_HALVES(name, suffix, V, Half)                                                              \
  template <class... Vs>                                                                                       \
  EMULATED V _mm512_##name##_##suffix(V a, Vs... more) {                                                       \
    return emulated::halves<Half>([](auto... half) { return _mm256_##name##_##suffix(half...); }, a, more...); \
  }
EMULATED_BY_HALVES(add, ps, __m512, __m256)
EMULATED_BY_HALVES(sub, ps, __m512, __m256)
EMULATED_BY_HALVES(mul, ps, __m512, __m256)
EMULATED_BY_HALVES(div, ps, __m512, __m256)
EMULATED_BY_HALVES(min, ps, __m512, __m256)
EMULATED_BY_HALVES(max, ps, __m512, __m256)
EMULATED_BY_HALVES(fmadd, ps, __m512, __m256)
EMULATED_BY_HALVES(fmsub, ps, __m512, __m256)
EMULATED_BY_HALVES(fnmadd, ps, __m512, __m256)
EMULATED_BY_HALVES(add, pd, __m512d, __m256d)
EMULATED_BY_HALVES(sub, pd, __m512d, __m256d)
EMULATED_BY_HALVES(mul, pd, __m512d, __m256d)
EMULATED_BY_HALVES(max, pd, __m512d, __m256d)
EMULATED_BY_HALVES(fmadd, pd, __m512d, __m256d)
EMULATED_BY_HALVES(fnmadd, pd, __m512d, __m256d)
EMULATED_BY_HALVES(add, epi16, __m512i, __m256i)
EMULATED_BY_HALVES(add, epi32, __m512i, __m256i)
EMULATED_BY_HALVES(sub, epi8, __m512i, __m256i)
EMULATED_BY_HALVES(sub, epi32, __m512i, __m256i)
EMULATED_BY_HALVES(mullo, epi32, __m512i, __m256i)
EMULATED_BY_HALVES(mul, epu32, __m512i, __m256i)
EMULATED_BY_HALVES(mulhi, epu16, __m512i, __m256i)
EMULATED_BY_HALVES(subs, epu16, __m512i, __m256i)
EMULATED_BY_HALVES(maddubs, epi16, __m512i, __m256i)
EMULATED_BY_HALVES(madd, epi16, __m512i, __m256i)
EMULATED_BY_HALVES(packus, epi16, __m512i, __m256i)
EMULATED_BY_HALVES(packus, epi32, __m512i, __m256i)
EMULATED_BY_HALVES(min, epu16, __m512i, __m256i)
EMULATED_BY_HALVES(max, epu8, __m512i, __m256i)
EMULATED_BY_HALVES(min, epu32, __m512i, __m256i)
EMULATED_BY_HALVES(max, epu32, __m512i, __m256i)
EMULATED_BY_HALVES(min, epi32, __m512i, __m256i)
EMULATED_BY_HALVES(shuffle, epi8, __m512i, __m256i)
EMULATED_BY_HALVES(srlv, epi32, __m512i, __m256i)

EMULATED __m512 _mm512_abs_ps(__m512 a) {
  return emulated::each<float>([](float x) { return std::fabs(x); }, a);
}
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  __m512i out{};
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return out;
}
EMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  return _mm512_ternarylogic_epi64(a, b, c, table);
}
EMULATED __m512i _mm512_popcnt_epi32(__m512i a) {
  return emulated::each<uint32_t>([](uint32_t x) { return std::popcount(x); }, a);
}

// Shifts; those by more than the lane's width leave nothing.
#define EMULATED_SHIFTS(suffix, T)                                                    \
  EMULATED __m512i _mm512_srli_##suffix(__m512i a, unsigned n) {                      \
    return emulated::each<T>([n](T x) { return n < 8 * sizeof(T) ? x >> n : 0; }, a); \
  }                                                                                   \
  EMULATED __m512i _mm512_slli_##suffix(__m512i a, unsigned n) {                      \
    return emulated::each<T>([n](T x) { return n < 8 * sizeof(T) ? x << n : 0; }, a); \
  }                                                                                   \
  EMULATED __m512i _mm512_srl_##suffix(__m512i a, __m128i n) {                        \
    const uint64_t count = static_cast<uint64_t>(n[0]);                               \
    return _mm512_srli_##suffix(a, static_cast<unsigned>(count < 64 ? count : 64));   \
  }
EMULATED_SHIFTS(epi16, uint16_t)
EMULATED_SHIFTS(epi32, uint32_t)
EMULATED_SHIFTS(epi64, uint64_t)
EMULATED __m512i _mm512_srai_epi32(__m512i a, unsigned n) {
  return emulated::each<int32_t>([n](int32_t x) { return x >> (n < 31 ? n : 31); }, a);
}
EMULATED __m512i _mm512_rolv_epi32(__m512i a, __m512i n) {
  return emulated::each<uint32_t>([](uint32_t x, uint32_t by) { return std::rotl(x, static_cast<int>(by % 32)); }, a,
                                  n);
}
EMULATED __m512i _mm512_maskz_sllv_epi32(__mmask16 mask, __m512i a, __m512i n) {
  const auto shift = [](uint32_t x, uint32_t by) { return by < 32 ? x << by : 0; };
  return emulated::select<uint32_t>(mask, emulated::each<uint32_t>(shift, a, n), __m512i{});
}

// Comparisons.
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  return emulated::where<float, __mmask16>([=](float x, float y) { return emulated::compared(x, y, predicate); }, a, b);
}
EMULATED __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int predicate) {
  return mask & _mm512_cmp_ps_mask(a, b, predicate);
}
EMULATED __mmask8 _mm512_mask_cmp_pd_mask(__mmask8 mask, __m512d a, __m512d b, int predicate) {
  const auto holds = [=](double x, double y) { return emulated::compared(x, y, predicate); };
  return mask & emulated::where<double, __mmask8>(holds, a, b);
}
#define EMULATED_COMPARISONS(suffix, T, Mask)                                                                     \
  EMULATED Mask _mm512_cmpeq_##suffix##_mask(__m512i a, __m512i b) {                                              \
    return emulated::where<T, Mask>([](T x, T y) { return x == y; }, a, b);                                       \
  }                                                                                                               \
  EMULATED Mask _mm512_cmplt_##suffix##_mask(__m512i a, __m512i b) {                                              \
    return emulated::where<T, Mask>([](T x, T y) { return x < y; }, a, b);                                        \
  }                                                                                                               \
  EMULATED Mask _mm512_cmple_##suffix##_mask(__m512i a, __m512i b) {                                              \
    return emulated::where<T, Mask>([](T x, T y) { return x <= y; }, a, b);                                       \
  }                                                                                                               \
  EMULATED Mask _mm512_cmpgt_##suffix##_mask(__m512i a, __m512i b) { return _mm512_cmplt_##suffix##_mask(b, a); } \
  EMULATED Mask _mm512_cmpge_##suffix##_mask(__m512i a, __m512i b) { return _mm512_cmple_##suffix##_mask(b, a); } \
  EMULATED Mask _mm512_mask_cmple_##suffix##_mask(Mask mask, __m512i a, __m512i b) {                              \
    return mask & _mm512_cmple_##suffix##_mask(a, b);                                                             \
  }                                                                                                               \
  EMULATED Mask _mm512_mask_cmpneq_##suffix##_mask(Mask mask, __m512i a, __m512i b) {                             \
    return mask & static_cast<Mask>(~_mm512_cmpeq_##suffix##_mask(a, b));                                         \
  }
EMULATED_COMPARISONS(epu8, uint8_t, __mmask64)
EMULATED_COMPARISONS(epu16, uint16_t, __mmask32)
EMULATED_COMPARISONS(epi32, int32_t, __mmask16)
EMULATED_COMPARISONS(epu32, uint32_t, __mmask16)
EMULATED __mmask16 _mm512_testn_epi32_mask(__m512i a, __m512i b) {
  return _mm512_cmpeq_epi32_mask(_mm512_and_si512(a, b), __m512i{});
}
EMULATED __mmask16 _mm_cmpneq_epu8_mask(__m128i a, __m128i b) {
  return emulated::where<uint8_t, __mmask16>([](uint8_t x, uint8_t y) { return x != y; }, a, b);
}
EMULATED __mmask32 _mm512_kunpackw(__mmask32 high, __mmask32 low) { return high << 16 | (low & 0xFFFF); }
EMULATED __mmask64 _mm512_kunpackd(__mmask64 high, __mmask64 low) { return high << 32 | (low & 0xFFFFFFFF); }
EMULATED uint32_t _cvtmask32_u32(__mmask32 mask) { return mask; }
EMULATED uint64_t _cvtmask64_u64(__mmask64 mask) { return mask; }

// Under a mask: an operand elsewhere, or 0.
#define EMULATED_MOVES(suffix, V, T)                                                                               \
  EMULATED V _mm512_mask_mov_##suffix(V other, uint64_t mask, V a) { return emulated::select<T>(mask, a, other); } \
  EMULATED V _mm512_maskz_mov_##suffix(uint64_t mask, V a) { return emulated::select<T>(mask, a, V{}); }           \
  EMULATED V _mm512_mask_blend_##suffix(uint64_t mask, V a, V b) { return emulated::select<T>(mask, b, a); }
EMULATED_MOVES(ps, __m512, float)
EMULATED_MOVES(epi8, __m512i, int8_t)
EMULATED_MOVES(epi16, __m512i, int16_t)
EMULATED_MOVES(epi32, __m512i, int32_t)
#define EMULATED_MASKED(name, suffix, V, T)                                    \
  EMULATED V _mm512_mask_##name##_##suffix(V other, uint64_t mask, V a, V b) { \
    return emulated::select<T>(mask, _mm512_##name##_##suffix(a, b), other);   \
  }                                                                            \
  EMULATED V _mm512_maskz_##name##_##suffix(uint64_t mask, V a, V b) {         \
    return emulated::select<T>(mask, _mm512_##name##_##suffix(a, b), V{});     \
  }
EMULATED_MASKED(add, ps, __m512, float)
EMULATED_MASKED(sub, ps, __m512, float)
EMULATED_MASKED(mul, ps, __m512, float)
EMULATED_MASKED(div, ps, __m512, float)
EMULATED_MASKED(max, ps, __m512, float)
EMULATED_MASKED(add, pd, __m512d, double)
EMULATED_MASKED(max, pd, __m512d, double)
EMULATED_MASKED(add, epi16, __m512i, int16_t)
EMULATED_MASKED(add, epi32, __m512i, int32_t)
EMULATED_MASKED(max, epu32, __m512i, uint32_t)
EMULATED __m512i _mm512_mask_or_epi32(__m512i other, __mmask16 mask, __m512i a, __m512i b) {
  return emulated::select<int32_t>(mask, a | b, other);
}
EMULATED __m512 _mm512_mask3_fmadd_ps(__m512 a, __m512 b, __m512 c, __mmask16 mask) {
  return emulated::select<float>(mask, _mm512_fmadd_ps(a, b, c), c);
}
EMULATED __m256i _mm256_mask_add_epi16(__m256i other, __mmask16 mask, __m256i a, __m256i b) {
  return emulated::select<int16_t>(mask, _mm256_add_epi16(a, b), other);
}

// Lanes in another order.
EMULATED __m512 _mm512_permutexvar_ps(__m512i index, __m512 v) { return emulated::permute<float>(index, v); }
EMULATED __m512i _mm512_permutexvar_epi32(__m512i index, __m512i v) { return emulated::permute<int32_t>(index, v); }
EMULATED __m512i _mm512_permutexvar_epi16(__m512i index, __m512i v) { return emulated::permute<int16_t>(index, v); }
EMULATED __m512i _mm512_permutexvar_epi8(__m512i index, __m512i v) { return emulated::permute<int8_t>(index, v); }
EMULATED __m512 _mm512_permutex2var_ps(__m512 v, __m512i index, __m512 w) {
  return emulated::permute2<float>(v, index, w);
}
EMULATED __m512i _mm512_permutex2var_epi32(__m512i v, __m512i index, __m512i w) {
  return emulated::permute2<int32_t>(v, index, w);
}
EMULATED __m512i _mm512_permutex2var_epi16(__m512i v, __m512i index, __m512i w) {
  return emulated::permute2<int16_t>(v, index, w);
}
EMULATED __m512 _mm512_permute_ps(__m512 v, int control) {  // within 128 bits
  emulated::Lanes<float, __m512> out;
  for (int i = 0; i < 16; ++i) out[i] = emulated::lanes<float>(v)[i / 4 * 4 + (control >> i % 4 * 2 & 3)];
  return std::bit_cast<__m512>(out);
}
EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int control) {
  std::array<__m128, 4> out;
  for (int i = 0; i < 4; ++i) out[i] = emulated::lanes<__m128>(i < 2 ? a : b)[control >> 2 * i & 3];
  return std::bit_cast<__m512>(out);
}
#define EMULATED_UNPACKS(suffix, V, T)                                                       \
  EMULATED V _mm512_unpacklo_##suffix(V a, V b) { return emulated::unpack<T>(a, b, false); } \
  EMULATED V _mm512_unpackhi_##suffix(V a, V b) { return emulated::unpack<T>(a, b, true); }
EMULATED_UNPACKS(ps, __m512, float)
EMULATED_UNPACKS(pd, __m512d, double)
EMULATED_UNPACKS(epi8, __m512i, int8_t)
EMULATED_UNPACKS(epi16, __m512i, int16_t)
EMULATED_UNPACKS(epi32, __m512i, int32_t)
EMULATED_UNPACKS(epi64, __m512i, int64_t)
#define EMULATED_PARTS(extract, insert, V, Part)                              \
  EMULATED Part extract(V v, int at) { return emulated::lanes<Part>(v)[at]; } \
  EMULATED V insert(V v, Part part, int at) {                                 \
    emulated::Lanes<Part, V> out = emulated::lanes<Part>(v);                  \
    out[at] = part;                                                           \
    return std::bit_cast<V>(out);                                             \
  }
EMULATED_PARTS(_mm512_extractf32x4_ps, _mm512_insertf32x4, __m512, __m128)
EMULATED_PARTS(_mm512_extractf32x8_ps, _mm512_insertf32x8, __m512, __m256)
EMULATED_PARTS(_mm512_extracti32x4_epi32, _mm512_inserti32x4, __m512i, __m128i)
EMULATED_PARTS(_mm512_extracti64x4_epi64, _mm512_inserti64x4, __m512i, __m256i)
EMULATED __m512i _mm512_mask_expand_epi8(__m512i other, __mmask64 mask, __m512i v) {
  return emulated::expand<int8_t>(other, mask, v);
}
EMULATED __m512i _mm512_mask_expand_epi16(__m512i other, __mmask32 mask, __m512i v) {
  return emulated::expand<int16_t>(other, mask, v);
}
EMULATED __m256i _mm256_mask_expand_epi8(__m256i other, __mmask32 mask, __m256i v) {
  return emulated::expand<int8_t>(other, mask, v);
}
EMULATED __m512i _mm512_mask_compress_epi8(__m512i other, __mmask64 mask, __m512i v) {
  return emulated::compress<int8_t>(other, mask, v);
}

// The same bits under another type; what a wider one has beyond them is undefined, and 0 here.
#define EMULATED_CAST(name, From, To)                                             \
  EMULATED To name(From v) {                                                      \
    To out{};                                                                     \
    std::memcpy(&out, &v, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To)); \
    return out;                                                                   \
  }
EMULATED_CAST(_mm512_castps_si512, __m512, __m512i)
EMULATED_CAST(_mm512_castsi512_ps, __m512i, __m512)
EMULATED_CAST(_mm512_castps_pd, __m512, __m512d)
EMULATED_CAST(_mm512_castpd_ps, __m512d, __m512)
EMULATED_CAST(_mm512_castps512_ps256, __m512, __m256)
EMULATED_CAST(_mm512_castps512_ps128, __m512, __m128)
EMULATED_CAST(_mm512_castps256_ps512, __m256, __m512)
EMULATED_CAST(_mm512_castps128_ps512, __m128, __m512)
EMULATED_CAST(_mm512_zextps256_ps512, __m256, __m512)
EMULATED_CAST(_mm512_castsi512_si256, __m512i, __m256i)
EMULATED_CAST(_mm512_castsi512_si128, __m512i, __m128i)
EMULATED_CAST(_mm512_castsi256_si512, __m256i, __m512i)

// Conversions.
#define EMULATED_CONVERSION(name, In, From, Out, To) \
  EMULATED Out _mm512_##name(In v) { return emulated::convert<Out, To, From>(v); }
EMULATED_CONVERSION(cvtepi32_ps, __m512i, int32_t, __m512, float)
EMULATED_CONVERSION(cvtepi32_pd, __m256i, int32_t, __m512d, double)
EMULATED_CONVERSION(cvtps_pd, __m256, float, __m512d, double)
EMULATED_CONVERSION(cvtepu8_epi32, __m128i, uint8_t, __m512i, uint32_t)
EMULATED_CONVERSION(cvtepu8_epi64, __m128i, uint8_t, __m512i, uint64_t)
EMULATED_CONVERSION(cvtepi8_epi32, __m128i, int8_t, __m512i, int32_t)
EMULATED_CONVERSION(cvtepi8_epi16, __m256i, int8_t, __m512i, int16_t)
EMULATED_CONVERSION(cvtepu16_epi32, __m256i, uint16_t, __m512i, uint32_t)
EMULATED_CONVERSION(cvtepi32_epi8, __m512i, uint32_t, __m128i, uint8_t)
EMULATED_CONVERSION(cvtepi32_epi16, __m512i, uint32_t, __m256i, uint16_t)
EMULATED_CONVERSION(cvtepi64_epi8, __m512i, uint64_t, __m128i, uint8_t)
EMULATED __m512i _mm512_mask_cvtepu16_epi32(__m512i other, __mmask16 mask, __m256i v) {
  return emulated::select<int32_t>(mask, _mm512_cvtepu16_epi32(v), other);
}
EMULATED void _mm512_mask_cvtepi32_storeu_epi8(void* p, __mmask16 mask, __m512i v) {
  emulated::store_lanes<int8_t>(p, mask, _mm512_cvtepi32_epi8(v));
}
EMULATED __m512 _mm512_cvtph_ps(__m256i v) {
  return std::bit_cast<__m512>(std::array<__m256, 2>{_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                                                     _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))});
}
EMULATED __m256i _mm512_cvtps_ph(__m512 v, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) emulated::stop("a rounding that it does not know");
  const auto half = [v](int i) { return _mm256_cvtps_ph(emulated::lanes<__m256>(v)[i], _MM_FROUND_TO_NEAREST_INT); };
  return std::bit_cast<__m256i>(std::array<__m128i, 2>{half(0), half(1)});
}
#define EMULATED_ROUNDING(name, T, function)                                      \
  EMULATED __m512i name(__m512 v) {                                               \
    emulated::Lanes<T, __m512i> out;                                              \
    for (int i = 0; i < 16; ++i) out[i] = function(emulated::lanes<float>(v)[i]); \
    return std::bit_cast<__m512i>(out);                                           \
  }
EMULATED_ROUNDING(_mm512_cvtps_epi32, int32_t, emulated::rounded)
EMULATED_ROUNDING(_mm512_cvttps_epi32, int32_t, emulated::truncated)
EMULATED_ROUNDING(_mm512_cvttps_epu32, uint32_t, emulated::truncated_unsigned)
EMULATED float _mm512_cvtss_f32(__m512 v) { return v[0]; }
#define EMULATED_EXPONENTS(suffix, V, T)                                                               \
  EMULATED V _mm512_scalef_##suffix(V a, V b) { return emulated::each<T>(emulated::scaled<T>, a, b); } \
  EMULATED V _mm512_roundscale_##suffix(V a, int control) {                                            \
    if (control != _MM_FROUND_NO_EXC) emulated::stop("a rounding that it does not know");              \
    return emulated::each<T>([](T x) { return std::nearbyint(x); }, a);                                \
  }
EMULATED_EXPONENTS(ps, __m512, float)
EMULATED_EXPONENTS(pd, __m512d, double)

// Over all lanes.
#define EMULATED_REDUCTIONS(suffix, V, T)                                  \
  EMULATED T _mm512_reduce_add_##suffix(V v) {                             \
    return emulated::reduce<T>([](T a, T b) { return a + b; }, v);         \
  }                                                                        \
  EMULATED T _mm512_reduce_max_##suffix(V v) {                             \
    return emulated::reduce<T>([](T a, T b) { return a > b ? a : b; }, v); \
  }                                                                        \
  EMULATED T _mm512_reduce_min_##suffix(V v) {                             \
    return emulated::reduce<T>([](T a, T b) { return a < b ? a : b; }, v); \
  }
EMULATED_REDUCTIONS(ps, __m512, float)
EMULATED_REDUCTIONS(pd, __m512d, double)
EMULATED_REDUCTIONS(epi32, __m512i, int32_t)
EMULATED_REDUCTIONS(epu32, __m512i, uint32_t)

// Dot products.
EMULATED __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) { return emulated::dot_bytes(sum, a, b); }
EMULATED __m128i _mm_dpbusd_epi32(__m128i sum, __m128i a, __m128i b) { return emulated::dot_bytes(sum, a, b); }
EMULATED __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}
using __m512bh = __m512i;
EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {  // the odd products first; subnormals count as 0
  const auto flushed = [](float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
  };
  const auto wide = [&](__m512i v, int i) {
    return flushed(std::bit_cast<float>(uint32_t{emulated::lanes<uint16_t>(v)[i]} << 16));
  };
  emulated::Lanes<float, __m512> out = emulated::lanes<float>(sum);
  for (int i = 0; i < 16; ++i) {
    for (const int j : {2 * i + 1, 2 * i}) out[i] = flushed(std::fma(wide(a, j), wide(b, j), flushed(out[i])));
  }
  return std::bit_cast<__m512>(out);
}
