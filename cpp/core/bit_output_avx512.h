// SPDX-License-Identifier: Apache-2.0
// The ranges of bit_output.h, 16 outputs at a time.
#pragma once

#include "avx512.h"

namespace bitmill::detail {

// An integer is inside if it is at most `length` past the first, as unsigned numbers.
struct Range {
  __m512i first, length;
};

// Of the columns that `range` points to, of n.
static inline Range load_range(const int32_t* range, int64_t n, __mmask16 lanes) {
  const __m512i first = _mm512_maskz_loadu_epi32(lanes, range);
  return {first, _mm512_sub_epi32(_mm512_maskz_loadu_epi32(lanes, range + n), first)};
}

static inline __mmask16 inside(__mmask16 lanes, const Range& range, __m512i dot) {
  return _mm512_mask_cmple_epu32_mask(lanes, _mm512_sub_epi32(dot, range.first), range.length);
}

// The bits of four tiles, the first lowest.
[[gnu::always_inline]] static inline uint64_t join(__mmask16 m0, __mmask16 m1, __mmask16 m2, __mmask16 m3) {
  return _cvtmask64_u64(_mm512_kunpackd(_mm512_kunpackw(m3, m2), _mm512_kunpackw(m1, m0)));
}

}  // namespace bitmill::detail
