// SPDX-License-Identifier: Apache-2.0
// Packing rows of floats with AVX-512: 32 values become one word by compare-to-mask. Bit-equal to the generic form.
#include <bit>

#include "avx512.h"
#include "bitpack.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

struct Bits {
  __mmask16 sign, nonzero;
};

template <Levels levels>
Bits compare(__m512 z, __m512 threshold) {
  const __m512 zero = _mm512_setzero_ps();
  if constexpr (levels == Levels::sign) {
    return {_mm512_cmp_ps_mask(z, zero, _CMP_GT_OQ), _mm512_cmp_ps_mask(z, zero, _CMP_NEQ_OQ)};
  } else if constexpr (levels == Levels::plus) {
    return {_mm512_cmp_ps_mask(z, zero, _CMP_GE_OQ), 0};
  } else {
    return {_mm512_cmp_ps_mask(z, threshold, _CMP_GT_OQ), 0};
  }
}

uint32_t join(__mmask16 low, __mmask16 high) { return _cvtmask32_u32(_mm512_kunpackw(high, low)); }

// mean_by_halves with vectors: the same sums in the same order. z has room for bit_ceil(k), and for 16.
float mean_by_halves_avx512(float* z, int64_t k) {
  if (k == 0) return 0.0f;
  int64_t half = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(k))) / 2;
  if (half < 16) return mean_by_halves(z, k);
  for (int64_t i = 0; i < half; i += 16) {  // the upper half is padded with zeros
    const __m512 upper = _mm512_maskz_loadu_ps(first_lanes(k - half - i), z + half + i);
    _mm512_storeu_ps(z + i, _mm512_add_ps(_mm512_loadu_ps(z + i), upper));
  }
  for (half /= 2; half >= 16; half /= 2) {
    for (int64_t i = 0; i < half; i += 16) {
      _mm512_storeu_ps(z + i, _mm512_add_ps(_mm512_loadu_ps(z + i), _mm512_loadu_ps(z + half + i)));
    }
  }
  __m512 sum = _mm512_loadu_ps(z);
  sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4E));
  sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xB1));
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1));
  return _mm512_cvtss_f32(sum) / static_cast<float>(k);
}

template <Levels levels, class T>
void pack_rows(const BitpackParams& p, const T* x, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  const __m512 threshold = _mm512_set1_ps(p.threshold);
  const Scratch<float> room(p.mean ? static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(p.k))) + 32 : 0);
  float* const magnitudes = p.mean ? room.get() : nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    int32_t* sign_row = p.sign + row * words;
    int32_t* nonzero_row = levels == Levels::sign ? p.nonzero + row * words : nullptr;
    int64_t count = 0;
    const auto put = [&](int64_t w, uint32_t sign, uint32_t nonzero) {
      sign_row[w] = static_cast<int32_t>(sign);
      if constexpr (levels == Levels::sign) nonzero_row[w] = static_cast<int32_t>(nonzero);
      count += _mm_popcnt_u32(levels == Levels::sign ? nonzero : sign);
    };
    int64_t w = 0;
    for (; 32 * (w + 1) <= p.k; ++w) {
      __m512 low = load16(input + 32 * w), high = load16(input + 32 * w + 16);
      if (p.shift) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(p.shift + 32 * w));
        high = _mm512_add_ps(high, _mm512_loadu_ps(p.shift + 32 * w + 16));
      }
      if (magnitudes) {
        _mm512_storeu_ps(magnitudes + 32 * w, _mm512_abs_ps(low));
        _mm512_storeu_ps(magnitudes + 32 * w + 16, _mm512_abs_ps(high));
      }
      const Bits a = compare<levels>(low, threshold), b = compare<levels>(high, threshold);
      put(w, join(a.sign, b.sign), join(a.nonzero, b.nonzero));
    }
    if (w < words) {  // 1 to 31 columns are left; lanes past k are masked out of every result
      uint32_t sign = 0, nonzero = 0;
      for (int half = 0; half < 2 && 32 * w + 16 * half < p.k; ++half) {
        const int64_t column = 32 * w + 16 * half, left = p.k - column;
        const __mmask16 lanes = first_lanes(left);
        __m512 z = load16(input + column, lanes);
        if (p.shift) z = _mm512_add_ps(z, _mm512_maskz_loadu_ps(lanes, p.shift + column));
        if (magnitudes) _mm512_storeu_ps(magnitudes + column, _mm512_abs_ps(z));
        const Bits bits = compare<levels>(z, threshold);
        sign |= static_cast<uint32_t>(bits.sign & lanes) << (16 * half);
        nonzero |= static_cast<uint32_t>(bits.nonzero & lanes) << (16 * half);
      }
      put(w, sign, nonzero);
    }
    if (p.count) p.count[row] = static_cast<int32_t>(count);
    if (magnitudes) p.mean[row] = mean_by_halves_avx512(magnitudes, p.k);
  }
}

}  // namespace

void bitpack_rows_avx512(const BitpackParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    switch (p.levels) {
      case Levels::sign:
        return pack_rows<Levels::sign>(p, x, begin, end);
      case Levels::plus:
        return pack_rows<Levels::plus>(p, x, begin, end);
      case Levels::bool_:
        return pack_rows<Levels::bool_>(p, x, begin, end);
    }
  });
}

}  // namespace bitmill::detail
