// SPDX-License-Identifier: Apache-2.0
// What the AVX-512 casts to FP4 share: 128 values to 64 bytes of codes. Every step between two codes lies at a few
// upper bits of the mantissa. So of a magnitude only those bits and its exponent matter, and one more that tells a
// step's own magnitude, the tie, from those above it: whether anything lies below. These are 6 bits from the first step
// on. A value of any dtype becomes a 16-bit word that ends with them, and a table of 64 codes does the rest.
#pragma once

#include <type_traits>

#include "avx512.h"
#include "fp4.h"

namespace bitmill::detail {

inline constexpr int64_t kCastBlock = 128;  // values that make one vector of codes

struct Fp4Caster {
  __m512i low, high;  // codes of the words `lowest`, the last one of code 0, `lowest` + 1, ...
  __m512i magnitude;  // mask of a word's magnitude
  __m512i lowest, infinity, nan_word;
  __m512i order;           // of pairs of codes
  int shift, sign_offset;  // bits of a value that a word lacks; the distance of its sign from bit 3
};

// Where pairs of codes, two bytes of them, come to lie: packing takes 64 bits of either operand in turn, in every
// 128-bit lane. `floats`: words were packed from 32 bits too.
static inline __m512i pair_order(bool floats) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) {             // values 4 i ... 4 i + 3
    const int vector = i / 8, four = i % 8;  // of 4 vectors of 32 values
    const int lane = floats ? four % 4 : four / 2, half = floats ? four / 4 : four % 2;
    order[i] = static_cast<uint16_t>(8 * lane + 2 * vector + half);
  }
  return _mm512_load_si512(order);
}

template <class T>
static inline Fp4Caster make_caster(Fp4Format format, NanPolicy nan, Rounding rounding) {
  constexpr int width = 8 * sizeof(T);
  constexpr int mantissa_bits = std::is_same_v<T, float> ? 23 : std::is_same_v<T, BFloat16> ? 7 : 10;
  constexpr int bias = std::is_same_v<T, Float16> ? 15 : 127;
  const auto all = [](uint32_t word) { return _mm512_set1_epi16(static_cast<short>(word)); };
  const Fp4Steps steps = fp4_steps(format, rounding);
  const int fraction = format.mantissa_bits + 1 + 1;
  const uint32_t below = (1u << (23 - fraction)) - 1;  // of a float, what its word has as one bit
  const uint32_t lowest = ((steps.first[0] | ((steps.first[0] & below) + below)) >> (23 - fraction)) - 1;
  alignas(64) uint16_t table[64];
  for (uint32_t i = 0; i < 64; ++i) {
    table[i] = static_cast<uint16_t>(fp4_code((lowest + i) << (23 - fraction), steps));
  }
  const int shift = mantissa_bits - fraction;
  const uint32_t magnitude = (1u << (width - 1 - shift)) - 1, exponents = (1u << (width - 1 - mantissa_bits)) - 1;
  return {_mm512_load_si512(table),
          _mm512_load_si512(table + 32),
          all(magnitude),
          all(lowest - ((127 - bias) << fraction)),
          all(exponents << fraction),
          all(nan == NanPolicy::max ? magnitude : 0),
          pair_order(std::is_same_v<T, float>),
          shift,
          width - 4 - shift};
}

// 32 floats to words, in the order 0-3 16-19 4-7 20-23 ...
static inline __m512i words_of(const Fp4Caster& caster, __m512 a, __m512 b) {
  const __m512i below = _mm512_set1_epi32((1 << caster.shift) - 1);
  const __m128i shift = _mm_cvtsi32_si128(caster.shift);
  const auto word = [&](__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i carry = _mm512_add_epi32(_mm512_and_si512(bits, below), below);
    return _mm512_srl_epi32(_mm512_or_si512(bits, carry), shift);
  };
  return _mm512_packus_epi32(word(a), word(b));
}
static inline __m512i load_words(const Fp4Caster& caster, const float* x) {
  return words_of(caster, load16(x), load16(x + 16));
}
template <class Half>
static inline __m512i load_words(const Fp4Caster& caster, const Half* x) {
  const __m512i bits = _mm512_loadu_si512(x), below = _mm512_set1_epi16(static_cast<short>((1 << caster.shift) - 1));
  const __m512i carry = _mm512_add_epi16(_mm512_and_si512(bits, below), below);
  return _mm512_srl_epi16(_mm512_or_si512(bits, carry), _mm_cvtsi32_si128(caster.shift));
}

// 32 words to codes, as words. Adds to `nans` the words that are NaN.
static inline __m512i codes_of(const Fp4Caster& caster, __m512i words, __mmask32& nans) {
  const __mmask32 nan = _mm512_cmpgt_epu16_mask(_mm512_and_si512(words, caster.magnitude), caster.infinity);
  nans |= nan;
  words = _mm512_mask_mov_epi16(words, nan, caster.nan_word);
  const __m512i above = _mm512_subs_epu16(_mm512_and_si512(words, caster.magnitude), caster.lowest);
  const __m512i index = _mm512_min_epu16(above, _mm512_set1_epi16(63));
  const __m512i code = _mm512_permutex2var_epi16(caster.low, index, caster.high);
  const __m512i sign = _mm512_srl_epi16(words, _mm_cvtsi32_si128(caster.sign_offset));
  return _mm512_ternarylogic_epi32(code, sign, _mm512_set1_epi16(8), 0xF8);  // code | (sign & 8)
}

// 128 codes as words, to bytes of two.
static inline __m512i join(const Fp4Caster& caster, __m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i weights = _mm512_set1_epi16(0x1001);
  const __m512i left = _mm512_maddubs_epi16(_mm512_packus_epi16(a, b), weights);
  const __m512i right = _mm512_maddubs_epi16(_mm512_packus_epi16(c, d), weights);
  return _mm512_permutexvar_epi16(caster.order, _mm512_packus_epi16(left, right));
}

}  // namespace bitmill::detail
