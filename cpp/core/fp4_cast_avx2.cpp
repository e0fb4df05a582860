// SPDX-License-Identifier: Apache-2.0
// Casts to FP4 and E8M0 and back with AVX2, bit-equal to the generic form.
#include "fp4_cast_avx2.h"

#include "fp4_scales_avx2.h"

namespace bitmill::detail {
namespace {

template <bool stream, class T>
void cast_row(const Fp4Caster& caster, const T* x, int64_t k, uint8_t* packed, uint32_t& nans) {
  int64_t column = 0;
  for (; column + kCastBlock <= k; column += kCastBlock) {
    cast_block<stream>(caster, x + column, packed + column / 2, nans);
  }
  if (column == k) return;
  T last[kCastBlock] = {};
  std::memcpy(last, x + column, static_cast<size_t>(k - column) * sizeof(T));
  uint8_t bytes[kCastBlock / 2];
  cast_block<false>(caster, last, bytes, nans);
  std::memcpy(packed + column / 2, bytes, static_cast<size_t>(ceil_div(k - column, 2)));
}

template <class T>
void cast_exponents(const T* x, bool up, uint8_t* bytes) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(load8(x)), _mm256_set1_epi32(0x7FFFFFFF));
  const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
  const __m256i exponent = _mm256_min_epu32(biased_log2(magnitude, up), _mm256_set1_epi32(254));
  const __m256i byte = _mm256_blendv_epi8(exponent, _mm256_set1_epi32(255), nan);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(byte), _mm256_extracti128_si256(byte, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), _mm_packus_epi16(words, words));
}

}  // namespace

bool fp4_cast_rows_avx2(const Fp4CastParams& p, int64_t begin, int64_t end) {
  return with_dtype(p.dtype, p.x, [&]<class T>(const T* x) {
    const Fp4Caster caster = make_caster<T>(p.format, p.nan, p.rounding);
    const RowsAsOne rows = rows_as_one(begin, end, p.k, p.k % 2 == 0 && p.row_stride == p.k);
    uint32_t nans = 0;
    for (int64_t row = begin; row < rows.end; ++row) {
      uint8_t* packed = p.packed + row * ceil_div(p.k, 2);
      const T* values = x + row * p.row_stride;
      past_the_cache(packed, rows.k / 2) ? cast_row<true>(caster, values, rows.k, packed, nans)
                                         : cast_row<false>(caster, values, rows.k, packed, nans);
    }
    _mm_sfence();
    return nans != 0;
  });
}

void fp4_uncast_rows_avx2(const uint8_t* packed, int64_t k, Fp4Format format, float* values, int64_t begin,
                          int64_t end) {
  const Fp4RowLookup<2> lookup(fp4_table(format).value);
  const RowsAsOne rows = rows_as_one(begin, end, k, k % 2 == 0);
  for (int64_t row = begin; row < rows.end; ++row) {
    uncast_row(lookup, packed + row * ceil_div(k, 2), rows.k, values + row * k,
               [](int64_t, int, __m256 v) { return v; });
  }
  _mm_sfence();
}

void e8m0_cast_avx2(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes) {
  with_dtype(dtype, x, [&]<class T>(const T* values) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) cast_exponents(values + i, up, bytes + i);
    if (i == count) return;
    T last[8] = {};
    uint8_t exponents[8];
    std::memcpy(last, values + i, static_cast<size_t>(count - i) * sizeof(T));
    cast_exponents(last, up, exponents);
    std::memcpy(bytes + i, exponents, static_cast<size_t>(count - i));
  });
}

void e8m0_uncast_avx2(const uint8_t* bytes, int64_t count, float* values) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i));
    _mm256_storeu_ps(values + i, e8m0_to_floats(_mm256_cvtepu8_epi32(codes)));
  }
  for (; i < count; ++i) values[i] = e8m0_to_float(bytes[i]);
}

}  // namespace bitmill::detail
