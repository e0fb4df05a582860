// SPDX-License-Identifier: Apache-2.0
// What the AVX2 files share: 8 floats to and from memory in each dtype, largest magnitudes, transposing.
#pragma once

#ifdef __aarch64__
#include "avx2_on_neon.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "floats.h"

namespace bitmill::detail {

#ifndef __aarch64__
// Everything so far is done, and x in a register. Without it g++ begins with more than it has registers for.
[[gnu::always_inline]] static inline void settle(__m256& x) { asm volatile("" : "+x"(x)); }
[[gnu::always_inline]] static inline void settle(__m256i& x) { asm volatile("" : "+x"(x)); }

// 4 bytes to all lanes from memory: the compiler would take some through a general register.
[[gnu::always_inline]] static inline __m256i broadcast(const void* p) {
  __m256i lanes;
  asm("vpbroadcastd %1, %0" : "=x"(lanes) : "m"(*static_cast<const int32_t*>(p)));
  return lanes;
}

// 4 floats to both halves, loaded where it says so: g++ would keep them for later, in registers that others need.
[[gnu::always_inline]] static inline __m256 broadcast_four(const float* p) {
  __m256 lanes;
  asm volatile("vbroadcastf128 %1, %0" : "=x"(lanes) : "m"(*reinterpret_cast<const float (*)[4]>(p)));
  return lanes;
}

// Lane 1, 2 or 3 of v from memory, in one instruction: the compiler takes two.
template <int lane>
static inline void insert(__m128& v, const float* p) {
  asm("vinsertps %2, %1, %0, %0" : "+x"(v) : "m"(*p), "i"(lane << 4));
}
#endif

static inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
static inline __m256 load8(const BFloat16* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
static inline __m256 load8(const Float16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

static inline void store8(float* out, __m256 value) { _mm256_storeu_ps(out, value); }
static inline void store8(Float16* out, __m256 value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store8(BFloat16* out, __m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i halves = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), nan);
  const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(low, high));
}

// 256 bits, as integers of any width.
static inline __m256i load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline void store_bits(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// Bits of magnitudes: they rise with it, and NaN lies above infinity.
static inline __m256i magnitudes(__m256 values) {
  return _mm256_and_si256(_mm256_castps_si256(values), _mm256_set1_epi32(0x7FFFFFFF));
}

static inline uint32_t highest(__m256i values) {
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0xB1))));
}

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

// 32 words, in order in a, b, c and d: put(0, their lowest bytes) ... put(3, their highest). A lane has every second
// four of the words: unpacked to 16 and then to 32 bits they are in order, and so are the bytes after in_order.
template <class Put>
static inline void split_bytes(__m256i a, __m256i b, __m256i c, __m256i d, const Put& put) {
  const __m256i gather =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  a = _mm256_shuffle_epi8(a, gather), b = _mm256_shuffle_epi8(b, gather);
  c = _mm256_shuffle_epi8(c, gather), d = _mm256_shuffle_epi8(d, gather);
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  put(0, _mm256_unpacklo_epi64(ab_low, cd_low));
  put(1, _mm256_unpackhi_epi64(ab_low, cd_low));
  put(2, _mm256_unpacklo_epi64(ab_high, cd_high));
  put(3, _mm256_unpackhi_epi64(ab_high, cd_high));
}
static inline __m256i in_order(__m256i bytes) {
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// 16 words each from `first` and `second` on to nibbles: 8 vectors, the lowest bits first, `next` bytes apart, in the
// order of split_bytes.
static inline void split_nibbles(const int32_t* first, const int32_t* second, uint8_t* out, int64_t next) {
  const __m256i a = load_bits(first), b = load_bits(first + 8), c = load_bits(second), d = load_bits(second + 8);
  split_bytes(a, b, c, d, [&](int byte, __m256i bytes) {
    const __m256i nibble = _mm256_set1_epi8(15), high = _mm256_srli_epi16(bytes, 4);
    store_bits(out + 2 * byte * next, _mm256_and_si256(bytes, nibble));
    store_bits(out + (2 * byte + 1) * next, _mm256_and_si256(high, nibble));
  });
}

}  // namespace bitmill::detail
