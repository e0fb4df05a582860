// SPDX-License-Identifier: Apache-2.0
// What the AVX-512 casts and their inverses share besides the cast itself: codes from memory, results to memory.
#pragma once

#include <cstdint>

#include "avx512.h"
#include "fp4_scales_avx512.h"

namespace bitmill::detail {

// Rows without gaps, and without a row that ends within a byte or a block, are one row.
struct RowsAsOne {
  int64_t end, k;
};
static inline RowsAsOne rows_as_one(int64_t begin, int64_t end, int64_t k, bool without_gaps) {
  return without_gaps && end > begin ? RowsAsOne{begin + 1, (end - begin) * k} : RowsAsOne{end, k};
}

// Results of this size would push everything else out of the caches: they go to memory without being read first.
static inline bool past_the_cache(const void* out, int64_t bytes) {
  return bytes >= int64_t{1} << 22 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}
template <bool stream>
static inline void store_bytes(uint8_t* out, __m512i bytes) {
  stream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(out), bytes) : _mm512_storeu_si512(out, bytes);
}
template <bool stream>
static inline void store_floats(float* out, __m512 values) {
  stream ? _mm512_stream_ps(out, values) : _mm512_storeu_ps(out, values);
}

// 8 bytes to 16 codes, each in the lowest bits of a lane; the other bits are whatever vpermps ignores.
static inline __m512i spread_codes(__m128i bytes) {
  const __m512i pairs = _mm512_cvtepu8_epi64(bytes);
  return _mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28));
}
static inline __m512i load_codes(const uint8_t* packed) {
  return spread_codes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
}
// The first `count` of 16 codes, the others 0.
static inline __m512i load_codes(const uint8_t* packed, int64_t count) {
  return spread_codes(_mm_maskz_loadu_epi8(first_lanes(ceil_div(count < 16 ? count : 16, 2)), packed));
}

}  // namespace bitmill::detail
