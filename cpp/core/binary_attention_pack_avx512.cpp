// SPDX-License-Identifier: Apache-2.0
// Packing the operands of binary attention with AVX-512. Zeros are rare, so signs come first, with one answer whether
// there is a zero; only then a second plane is asked for (bitpack).
#include "avx512.h"
#include "binary_attention_task.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

template <bool zeros>
__mmask16 positive(__m512 x) {
  return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), zeros ? _CMP_GT_OQ : _CMP_GE_OQ);
}

// |x| - 1 as unsigned integers: above that of infinity for 0, which wraps, and for NaN.
__m512i below_magnitude(__m512 x) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
  return _mm512_sub_epi32(magnitude, _mm512_set1_epi32(1));
}

template <bool zeros, class T>
bool pack_signs(const T* x, int64_t stride, int64_t rows, int64_t d, bool tiles, int32_t* out) {
  const int64_t words = word_count(d), step = tiles ? kTileRows : 1;
  __m512i most = _mm512_setzero_si512();
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * stride;
    int32_t* to = tiles ? out + row / kTileRows * words * kTileRows + row % kTileRows : out + row * words;
    int64_t w = 0;
    for (; 32 * (w + 1) <= d; ++w) {
      const __m512 low = load16(from + 32 * w), high = load16(from + 32 * w + 16);
      if constexpr (zeros) {
        most = _mm512_max_epu32(most, _mm512_max_epu32(below_magnitude(low), below_magnitude(high)));
      }
      const __mmask32 bits = _mm512_kunpackw(positive<zeros>(high), positive<zeros>(low));
      to[w * step] = static_cast<int32_t>(_cvtmask32_u32(bits));
    }
    if (w < words) {  // 1 to 31 columns are left
      uint32_t bits = 0;
      for (int64_t column = 32 * w; column < d; column += 16) {
        const __mmask16 lanes = first_lanes(d - column);
        const __m512 value = load16(from + column, lanes);
        if constexpr (zeros) most = _mm512_mask_max_epu32(most, lanes, most, below_magnitude(value));
        bits |= static_cast<uint32_t>(positive<zeros>(value) & lanes) << (column - 32 * w);
      }
      to[w * step] = static_cast<int32_t>(bits);
    }
  }
  return zeros && _mm512_cmpgt_epu32_mask(most, _mm512_set1_epi32(0x7F7FFFFF));
}

// Bits of 16 channels over up to 32 keys: a lane a channel.
template <class T>
bool values_to_bits(const T* x, int64_t stride, int64_t m, int64_t e, int32_t* sign, int32_t* nonzero) {
  const int64_t words = word_count(m);
  __mmask16 zeros = 0;
  const __m512 zero = _mm512_setzero_ps();
  for (int64_t tile = 0; tile < tile_count(e); ++tile) {
    const __mmask16 lanes = first_lanes(e - tile * kTileRows);
    for (int64_t w = 0; w < words; ++w) {
      __m512i s = _mm512_setzero_si512(), z = s, bit = _mm512_set1_epi32(1);
      for (int64_t j = 32 * w; j < 32 * (w + 1) && j < m; ++j, bit = _mm512_add_epi32(bit, bit)) {
        const __m512 value = load16(x + j * stride + tile * kTileRows, lanes);
        const __mmask16 positive = nonzero ? _mm512_cmp_ps_mask(value, zero, _CMP_GT_OQ)
                                           : _mm512_mask_cmp_ps_mask(lanes, value, zero, _CMP_GE_OQ);
        s = _mm512_mask_or_epi32(s, positive, s, bit);
        if (nonzero) z = _mm512_mask_or_epi32(z, _mm512_cmp_ps_mask(value, zero, _CMP_NEQ_OQ), z, bit);
      }
      const int64_t at = (tile * words + w) * kTileRows;
      _mm512_storeu_si512(sign + at, s);
      if (nonzero) _mm512_storeu_si512(nonzero + at, z);
      const __m512i keys = _mm512_sub_epi32(bit, _mm512_set1_epi32(1));  // the bits of all, as 2^32 is 0
      zeros |= _mm512_mask_cmpneq_epi32_mask(lanes, z, keys);
    }
  }
  return nonzero && zeros;
}

}  // namespace

void attention_transpose_avx512(const int32_t* rows, int64_t stride, int64_t m, int64_t e, int64_t longest,
                                int32_t* tiles) {
  const int64_t words = word_count(longest);
  for (int64_t c = 0; c < e / 32; ++c) {
    int32_t* low = tiles + 2 * c * words * kTileRows;
    int32_t* high = low + words * kTileRows;
    for (int64_t w = 0; w < words; ++w) {
      __m512i s0 = _mm512_setzero_si512(), s1 = s0, bit = _mm512_set1_epi32(1);
      for (int64_t j = 32 * w; j < 32 * (w + 1) && j < m; ++j, bit = _mm512_add_epi32(bit, bit)) {
        const uint32_t channels = static_cast<uint32_t>(rows[j * stride + c]);
        s0 = _mm512_mask_or_epi32(s0, static_cast<__mmask16>(channels), s0, bit);
        s1 = _mm512_mask_or_epi32(s1, static_cast<__mmask16>(channels >> 16), s1, bit);
      }
      _mm512_storeu_si512(low + w * kTileRows, s0);
      _mm512_storeu_si512(high + w * kTileRows, s1);
    }
  }
}

bool attention_signs_avx512(const BinaryAttentionParams& p, const void* x, int64_t stride, int64_t rows, bool tiles,
                            int32_t* out) {
  return with_dtype(p.dtype, x, [&](const auto* values) {
    return p.zeros ? pack_signs<true>(values, stride, rows, p.d, tiles, out)
                   : pack_signs<false>(values, stride, rows, p.d, tiles, out);
  });
}

bool attention_values_avx512(Dtype dtype, const void* x, int64_t stride, int64_t m, int64_t e, int32_t* sign,
                             int32_t* nonzero) {
  return with_dtype(dtype, x, [&](const auto* values) { return values_to_bits(values, stride, m, e, sign, nonzero); });
}

}  // namespace bitmill::detail
