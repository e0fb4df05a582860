// SPDX-License-Identifier: Apache-2.0
// Casts to FP4 and E8M0 and back with AVX-512, bit-equal to the generic form.
#include "fp4_cast_avx512.h"

#include <cstring>

#include "fp4_uncast_avx512.h"

namespace bitmill::detail {
namespace {

template <class T>
__m512i cast_block(const Fp4Caster& caster, const T* x, __mmask32& nans) {
  const __m512i a = codes_of(caster, load_words(caster, x), nans);
  const __m512i b = codes_of(caster, load_words(caster, x + 32), nans);
  const __m512i c = codes_of(caster, load_words(caster, x + 64), nans);
  const __m512i d = codes_of(caster, load_words(caster, x + 96), nans);
  return join(caster, a, b, c, d);
}

template <bool stream, class T>
bool cast_row(const Fp4Caster& caster, const T* x, int64_t k, uint8_t* packed) {
  __mmask32 nans = 0;
  int64_t column = 0;
  for (; column + kCastBlock <= k; column += kCastBlock) {
    store_bytes<stream>(packed + column / 2, cast_block(caster, x + column, nans));
  }
  if (column < k) {
    T last[kCastBlock] = {};
    std::memcpy(last, x + column, static_cast<size_t>(k - column) * sizeof(T));
    uint8_t bytes[kCastBlock / 2];
    _mm512_storeu_si512(bytes, cast_block(caster, last, nans));
    std::memcpy(packed + column / 2, bytes, static_cast<size_t>(ceil_div(k - column, 2)));
  }
  return nans != 0;
}

template <bool stream>
void uncast_row(__m512 table, const uint8_t* packed, int64_t k, float* values) {
  int64_t column = 0;
  for (; column + 16 <= k; column += 16) {
    store_floats<stream>(values + column, _mm512_permutexvar_ps(load_codes(packed + column / 2), table));
  }
  const __mmask16 left = first_lanes(k - column);
  const __m512 last = _mm512_permutexvar_ps(load_codes(packed + column / 2, k - column), table);
  _mm512_mask_storeu_ps(values + column, left, last);
}

}  // namespace

bool fp4_cast_rows_avx512(const Fp4CastParams& p, int64_t begin, int64_t end) {
  return with_dtype(p.dtype, p.x, [&]<class T>(const T* x) {
    const Fp4Caster caster = make_caster<T>(p.format, p.nan, p.rounding);
    const RowsAsOne rows = rows_as_one(begin, end, p.k, p.k % 2 == 0 && p.row_stride == p.k);
    bool any_nan = false;
    for (int64_t row = begin; row < rows.end; ++row) {
      uint8_t* packed = p.packed + row * ceil_div(p.k, 2);
      const T* values = x + row * p.row_stride;
      any_nan |= past_the_cache(packed, rows.k / 2) ? cast_row<true>(caster, values, rows.k, packed)
                                                    : cast_row<false>(caster, values, rows.k, packed);
    }
    _mm_sfence();
    return any_nan;
  });
}

void fp4_uncast_rows_avx512(const uint8_t* packed, int64_t k, Fp4Format format, float* values, int64_t begin,
                            int64_t end) {
  const Fp4Table values_of = fp4_table(format);
  const __m512 table = _mm512_loadu_ps(values_of.value);
  const RowsAsOne rows = rows_as_one(begin, end, k, k % 2 == 0);
  for (int64_t row = begin; row < rows.end; ++row) {
    const uint8_t* codes = packed + row * ceil_div(k, 2);
    float* out = values + row * k;
    past_the_cache(out, rows.k * 4) ? uncast_row<true>(table, codes, rows.k, out)
                                    : uncast_row<false>(table, codes, rows.k, out);
  }
  _mm_sfence();
}

void e8m0_cast_avx512(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes) {
  with_dtype(dtype, x, [&](const auto* values) {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 lanes = first_lanes(count - i);
      const __m512i bits = _mm512_castps_si512(load16(values + i, lanes));
      const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
      const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
      const __m512i exponent = _mm512_min_epu32(biased_log2(magnitude, up), _mm512_set1_epi32(254));
      _mm512_mask_cvtepi32_storeu_epi8(bytes + i, lanes, _mm512_mask_mov_epi32(exponent, nan, _mm512_set1_epi32(255)));
    }
  });
}

void e8m0_uncast_avx512(const uint8_t* bytes, int64_t count, float* values) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, bytes + i));
    _mm512_mask_storeu_ps(values + i, lanes, e8m0_to_floats(codes));
  }
}

}  // namespace bitmill::detail
