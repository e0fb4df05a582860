// SPDX-License-Identifier: Apache-2.0
// What the AVX2 casts to FP4 share: 64 values to 32 bytes of codes. Every step between two codes lies at a few upper
// bits of the mantissa. So of a magnitude only those bits and its exponent matter, and one more that tells a step's own
// magnitude, the tie, from those above it: whether anything lies below. These are 6 bits from the first step on. A
// value of any dtype becomes a 16-bit word that ends with them, then a byte of the 6 bits and the sign, and four
// lookups of 16 codes do the rest.
#pragma once

#include <cstring>
#include <type_traits>

#include "fp4_lookup_avx2.h"

namespace bitmill::detail {
namespace {

inline constexpr int64_t kCastBlock = 64;  // values that make one vector of codes

struct Fp4Caster {
  __m256i table[4];  // codes of the words `lowest`, the last one of code 0, `lowest` + 1, ...
  __m256i magnitude, lowest, infinity;
  __m256i cleared;  // of the byte of a NaN
  int shift;        // bits of a value that a word lacks
  int sign_offset;  // the distance of a word's sign from bit 6
};

template <class T>
static inline Fp4Caster make_caster(Fp4Format format, NanPolicy nan, Rounding rounding) {
  constexpr int width = 8 * sizeof(T);
  constexpr int mantissa_bits = std::is_same_v<T, float> ? 23 : std::is_same_v<T, BFloat16> ? 7 : 10;
  constexpr int bias = std::is_same_v<T, Float16> ? 15 : 127;
  const auto all = [](uint32_t word) { return _mm256_set1_epi16(static_cast<short>(word)); };
  const Fp4Steps steps = fp4_steps(format, rounding);
  const int fraction = format.mantissa_bits + 1 + 1;
  const uint32_t below = (1u << (23 - fraction)) - 1;  // of a float, what its word has as one bit
  const uint32_t lowest = ((steps.first[0] | ((steps.first[0] & below) + below)) >> (23 - fraction)) - 1;
  Fp4Caster caster;
  for (uint32_t part = 0; part < 4; ++part) {
    LaneBytes codes;
    for (uint32_t i = 0; i < 16; ++i) {
      codes.byte[i] = static_cast<uint8_t>(fp4_code((lowest + 16 * part + i) << (23 - fraction), steps));
    }
    caster.table[part] = both_lanes(codes);
  }
  caster.shift = mantissa_bits - fraction;
  caster.magnitude = all((1u << (width - 1 - caster.shift)) - 1);
  caster.lowest = all(lowest - ((127 - bias) << fraction));
  caster.infinity = all(((1u << (width - 1 - mantissa_bits)) - 1) << fraction);
  caster.cleared = all(nan == NanPolicy::max ? 64 : 0xFFFF);
  caster.sign_offset = width - 7 - caster.shift;
  return caster;
}

// 16 floats to words, in the order 0-3 8-11 4-7 12-15.
static inline __m256i words_of(const Fp4Caster& caster, __m256 a, __m256 b) {
  const __m256i below = _mm256_set1_epi32((1 << caster.shift) - 1);
  const __m128i shift = _mm_cvtsi32_si128(caster.shift);
  const auto word = [&](__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i carry = _mm256_add_epi32(_mm256_and_si256(bits, below), below);
    return _mm256_srl_epi32(_mm256_or_si256(bits, carry), shift);
  };
  return _mm256_packus_epi32(word(a), word(b));
}
// 16 halves to words.
static inline __m256i words_of(const Fp4Caster& caster, const void* x) {
  const __m256i bits = load_bits(x);
  const __m256i below = _mm256_set1_epi16(static_cast<short>((1 << caster.shift) - 1));
  const __m256i carry = _mm256_add_epi16(_mm256_and_si256(bits, below), below);
  return _mm256_srl_epi16(_mm256_or_si256(bits, carry), _mm_cvtsi32_si128(caster.shift));
}

// 32 words to bytes of two codes, as words. Sets bits of `nans` if one is NaN.
static inline __m256i pairs_of(const Fp4Caster& caster, __m256i a, __m256i b, uint32_t& nans) {
  __m256i any_nan = _mm256_setzero_si256();
  const auto six_bits = [&](__m256i word) {
    const __m256i magnitude = _mm256_and_si256(word, caster.magnitude);
    const __m256i nan = _mm256_cmpgt_epi16(magnitude, caster.infinity);
    any_nan = _mm256_or_si256(any_nan, nan);
    const __m256i index = _mm256_min_epu16(_mm256_subs_epu16(magnitude, caster.lowest), _mm256_set1_epi16(63));
    const __m256i sign =
        _mm256_and_si256(_mm256_srl_epi16(word, _mm_cvtsi32_si128(caster.sign_offset)), _mm256_set1_epi16(64));
    return _mm256_andnot_si256(_mm256_and_si256(nan, caster.cleared), _mm256_or_si256(index, sign));
  };
  const __m256i bytes = _mm256_packus_epi16(six_bits(a), six_bits(b));
  nans |= static_cast<uint32_t>(_mm256_movemask_epi8(any_nan));
  const __m256i bit4 = _mm256_slli_epi16(bytes, 3);  // to where a blend looks
  const auto codes = [&](int part) { return _mm256_shuffle_epi8(caster.table[part], bytes); };
  __m256i low = _mm256_blendv_epi8(codes(0), codes(1), bit4), high = _mm256_blendv_epi8(codes(2), codes(3), bit4);
  settle(low), settle(high);  // now the next bit; otherwise g++ runs out of registers
  const __m256i bit5 = _mm256_slli_epi16(bytes, 2);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(bytes, 3), _mm256_set1_epi8(8));
  const __m256i code = _mm256_or_si256(_mm256_blendv_epi8(low, high, bit5), sign);
  return _mm256_maddubs_epi16(code, _mm256_set1_epi16(0x1001));
}

// 32 codes, a byte each, of every 8 values 4 in each lane, to 16 bytes.
static inline __m128i join_codes(__m256i codes) {
  const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));
  const __m256i bytes = _mm256_packus_epi16(pairs, pairs);
  return _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}

// Results of this size would push everything else out of the caches: they go to memory without being read first.
static inline bool past_the_cache(const void* out, int64_t bytes) {
  return bytes >= int64_t{1} << 22 && reinterpret_cast<uintptr_t>(out) % 32 == 0;
}
template <bool stream>
static inline void store_bytes(uint8_t* out, __m128i bytes) {
  __m128i* to = reinterpret_cast<__m128i*>(out);
  stream ? _mm_stream_si128(to, bytes) : _mm_storeu_si128(to, bytes);
}
template <bool stream>
static inline void store_floats(float* out, __m256 values) {
  stream ? _mm256_stream_ps(out, values) : _mm256_storeu_ps(out, values);
}

// Rows without gaps, and without a row that ends within a byte or a block, are one row.
struct RowsAsOne {
  int64_t end, k;
};
static inline RowsAsOne rows_as_one(int64_t begin, int64_t end, int64_t k, bool without_gaps) {
  return without_gaps && end > begin ? RowsAsOne{begin + 1, (end - begin) * k} : RowsAsOne{end, k};
}

// 64 values to 32 bytes: value(i) are the floats 8 i ... 8 i + 7.
template <bool stream, class Value>
static inline void cast_floats(const Fp4Caster& caster, const Value& value, uint8_t* packed, uint32_t& nans) {
  const auto pairs = [&](int i) {
    const __m256i a = words_of(caster, value(i), value(i + 1)), b = words_of(caster, value(i + 2), value(i + 3));
    return pairs_of(caster, a, b, nans);
  };
  __m256i left = pairs(0);
  settle(left);  // one after the other; otherwise g++ runs out of registers
  const __m256i bytes = _mm256_packus_epi16(left, pairs(4));  // of every 8 values 4 in each lane
  const __m128i first = _mm256_castsi256_si128(bytes), second = _mm256_extracti128_si256(bytes, 1);
  store_bytes<stream>(packed, _mm_unpacklo_epi16(first, second));
  store_bytes<stream>(packed + 16, _mm_unpackhi_epi16(first, second));
}

template <bool stream>
static inline void cast_block(const Fp4Caster& caster, const float* x, uint8_t* packed, uint32_t& nans) {
  cast_floats<stream>(caster, [&](int i) { return load8(x + 8 * i); }, packed, nans);
}
template <bool stream, class Half>
static inline void cast_block(const Fp4Caster& caster, const Half* x, uint8_t* packed, uint32_t& nans) {
  const auto pairs = [&](int i) {
    return pairs_of(caster, words_of(caster, x + i), words_of(caster, x + i + 16), nans);
  };
  __m256i left = pairs(0);
  settle(left);
  const __m256i bytes = _mm256_packus_epi16(left, pairs(32));  // of every 16 values 8 in each lane
  const __m128i first = _mm256_castsi256_si128(bytes), second = _mm256_extracti128_si256(bytes, 1);
  store_bytes<stream>(packed, _mm_unpacklo_epi32(first, second));
  store_bytes<stream>(packed + 16, _mm_unpackhi_epi32(first, second));
}

// A row of codes to floats: scaled(b, i, v) are the results v, columns 32 b + 8 i ... 32 b + 8 i + 7, in order.
template <bool stream, int planes, class Scaled>
static inline void uncast_row(const Fp4RowLookup<planes>& lookup, const uint8_t* packed, int64_t k, float* values,
                              const Scaled& scaled) {
  const auto block = [&]<bool past>(const uint8_t* codes, int64_t b, float* out) {
    __m256 v[4];
    lookup(lookup.load(codes), v);
    for (int i = 0; i < 4; ++i) store_floats<past>(out + 8 * i, scaled(b, i, v[i]));
  };
  const int64_t blocks = k / 32, left = k % 32;
  for (int64_t b = 0; b < blocks; ++b) block.template operator()<stream>(packed + 16 * b, b, values + 32 * b);
  if (left == 0) return;
  uint8_t codes[16] = {};
  float last[32];
  std::memcpy(codes, packed + 16 * blocks, static_cast<size_t>(ceil_div(left, 2)));
  block.template operator()<false>(codes, blocks, last);
  std::memcpy(values + 32 * blocks, last, static_cast<size_t>(left) * sizeof(float));
}
template <int planes, class Scaled>
static inline void uncast_row(const Fp4RowLookup<planes>& lookup, const uint8_t* packed, int64_t k, float* values,
                              const Scaled& scaled) {
  past_the_cache(values, 4 * k) ? uncast_row<true>(lookup, packed, k, values, scaled)
                                : uncast_row<false>(lookup, packed, k, values, scaled);
}

}  // namespace
}  // namespace bitmill::detail
