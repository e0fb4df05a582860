// SPDX-License-Identifier: Apache-2.0
// Stochastic casts to FP4 and MXFP4 with AVX-512, bit-equal to the generic form: 64 values at a time with the random
// numbers of 16 blocks of Philox. Rows that begin within a block are left to the generic form.
#include "avx512.h"
#include "fp4.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kValues = 64;

struct Words {
  __m512i of[4];  // of 16 elements each, in order
};

// Upper and lower halves of 16 products.
void multiply(__m512i a, __m512i factor, __m512i& upper, __m512i& lower) {
  constexpr __mmask16 odd = 0xAAAA;
  const __m512i evens = _mm512_mul_epu32(a, factor), odds = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  upper = _mm512_mask_mov_epi32(_mm512_srli_epi64(evens, 32), odd, odds);
  lower = _mm512_mask_mov_epi32(evens, odd, _mm512_slli_epi64(odds, 32));
}

// Blocks [block, block + 16). Lane 4 i + j has block 4 j + i, so that the transposed words are in order.
Words philox16(uint64_t block, RandomStream stream) {
  const auto all = [](uint64_t word) { return _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(word))); };
  const __m512i lane = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i c0 = _mm512_add_epi32(all(block), lane), c1 = all(block >> 32);
  c1 = _mm512_mask_add_epi32(c1, _mm512_cmplt_epu32_mask(c0, lane), c1, _mm512_set1_epi32(1));
  __m512i c2 = all(stream.offset), c3 = all(stream.offset >> 32), k0 = all(stream.seed), k1 = all(stream.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    __m512i a_upper, a_lower, b_upper, b_lower;
    multiply(c0, all(0xD2511F53u), a_upper, a_lower);
    multiply(c2, all(0xCD9E8D57u), b_upper, b_lower);
    c0 = _mm512_ternarylogic_epi32(b_upper, c1, k0, 0x96);  // exclusive or
    c1 = b_lower;
    c2 = _mm512_ternarylogic_epi32(a_upper, c3, k1, 0x96);
    c3 = a_lower;
    k0 = _mm512_add_epi32(k0, all(0x9E3779B9u));
    k1 = _mm512_add_epi32(k1, all(0xBB67AE85u));
  }
  __m512 z[4] = {_mm512_castsi512_ps(c0), _mm512_castsi512_ps(c1), _mm512_castsi512_ps(c2), _mm512_castsi512_ps(c3)};
  transpose4(z);
  return {{_mm512_castps_si512(z[0]), _mm512_castps_si512(z[1]), _mm512_castps_si512(z[2]), _mm512_castps_si512(z[3])}};
}

// The codes toward zero by exponent and mantissa bits as many as the format's, from the last ones of code 0 on.
struct StochasticCaster {
  __m512i index, lowest, nan_code;
  __m512 value, inverse, largest;
  int shift;
};

StochasticCaster make_caster(Fp4Format format, NanPolicy nan) {
  const Fp4Steps steps = fp4_steps(format, Rounding::stochastic);
  const Fp4Distances distances = fp4_distances(format);
  const int shift = 23 - format.mantissa_bits;
  const uint32_t lowest = (steps.first[0] >> shift) - 1;
  uint32_t index[16];
  for (uint32_t i = 0; i < 16; ++i) index[i] = fp4_code((lowest + i) << shift, steps);
  const __m512 value = _mm512_castps256_ps512(_mm256_loadu_ps(distances.value));
  const __m512 inverse = _mm512_castps256_ps512(_mm256_loadu_ps(distances.inverse));
  return {_mm512_loadu_si512(index),
          _mm512_set1_epi32(static_cast<int>(lowest)),
          _mm512_set1_epi32(nan == NanPolicy::max ? 7 : 0),
          value,
          inverse,
          _mm512_set1_ps(distances.value[7]),
          shift};
}

// 16 codes; adds to `nans` the values that are NaN.
__m512i codes_of(const StochasticCaster& caster, __m512 x, __m512i random, __mmask16& nans) {
  const __m512i bits = _mm512_castps_si512(x), magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
  nans |= nan;
  const __m512i upper_bits = _mm512_srl_epi32(magnitude, _mm_cvtsi32_si128(caster.shift));
  const __m512i above_lowest = _mm512_sub_epi32(_mm512_max_epu32(upper_bits, caster.lowest), caster.lowest);
  const __m512i index = _mm512_permutexvar_epi32(_mm512_min_epu32(above_lowest, _mm512_set1_epi32(15)), caster.index);
  const __m512 within = _mm512_min_ps(_mm512_castsi512_ps(magnitude), caster.largest);  // NaN becomes the largest
  const __m512 above = _mm512_sub_ps(within, _mm512_permutexvar_ps(index, caster.value));
  const __m512i chance = _mm512_cvttps_epu32(_mm512_mul_ps(above, _mm512_permutexvar_ps(index, caster.inverse)));
  const __mmask16 up = _mm512_cmplt_epu32_mask(_mm512_add_epi32(chance, random), chance);
  const __m512i rounded = _mm512_mask_add_epi32(index, up, index, _mm512_set1_epi32(1));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 28), _mm512_set1_epi32(8));
  return _mm512_mask_mov_epi32(_mm512_or_si512(rounded, sign), nan, caster.nan_code);
}

// The first `count` of 16 codes, two a byte.
void store_codes(uint8_t* packed, __m512i codes, int64_t count) {
  const __m128i bytes = _mm512_cvtepi64_epi8(_mm512_or_si512(codes, _mm512_srli_epi64(codes, 28)));
  if (count >= 16) return _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), bytes);
  _mm_mask_storeu_epi8(packed, first_lanes(ceil_div(count, 2)), bytes);
}

template <class T>
bool cast_row(const Fp4CastParams& p, const StochasticCaster& caster, const T* x, int64_t row) {
  uint8_t* packed = p.packed + row * ceil_div(p.k, 2);
  __mmask16 nans = 0;
  for (int64_t column = 0; column < p.k; column += kValues) {
    const Words words = philox16(static_cast<uint64_t>(row * p.k + column) / 4, p.random);
    for (int64_t i = 0; i < 4 && column + 16 * i < p.k; ++i) {
      const int64_t first = column + 16 * i, left = p.k - first;
      const __m512 values = left >= 16 ? load16(x + first) : load16(x + first, first_lanes(left));
      store_codes(packed + first / 2, codes_of(caster, values, words.of[i], nans), left);
    }
  }
  return nans != 0;
}

template <class T>
void quantize_row(const Mxfp4QuantizeParams& p, const StochasticCaster& caster, const T* x, int64_t row) {
  uint8_t *packed = p.packed + row * ceil_div(p.k, 2), *scale = p.scale + row * ceil_div(p.k, kMxBlock);
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  for (int64_t column = 0; column < p.k; column += kValues) {
    const Words words = philox16(static_cast<uint64_t>(row * p.k + column) / 4, p.random);
    for (int64_t block = 0; block < 2 && column + kMxBlock * block < p.k; ++block) {
      const int64_t first = column + kMxBlock * block, left = p.k - first;
      const __m512 a = load16(x + first, first_lanes(left)), b = load16(x + first + 16, first_lanes(left - 16));
      const __m512i larger = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                                              _mm512_and_si512(_mm512_castps_si512(b), magnitude));
      const uint8_t byte = mxfp4_scale(_mm512_reduce_max_epu32(larger), p.rule);
      scale[first / kMxBlock] = byte;
      // 1 / 2^E is exact and normal; the values of a block that is not finite become NaN, code 0.
      const __m512i factor = _mm512_set1_epi32(byte == 255 ? -1 : (254 - byte) << 23);
      __mmask16 nans = 0;
      const __m512i left_codes =
          codes_of(caster, _mm512_mul_ps(a, _mm512_castsi512_ps(factor)), words.of[2 * block], nans);
      const __m512i right_codes =
          codes_of(caster, _mm512_mul_ps(b, _mm512_castsi512_ps(factor)), words.of[2 * block + 1], nans);
      store_codes(packed + first / 2, left_codes, left);
      if (left > 16) store_codes(packed + first / 2 + 8, right_codes, left - 16);
    }
  }
}

}  // namespace

bool fp4_cast_rows_stochastic_avx512(const Fp4CastParams& p, int64_t begin, int64_t end) {
  const StochasticCaster caster = make_caster(p.format, p.nan);
  return with_dtype(p.dtype, p.x, [&](const auto* x) {
    bool any_nan = false;
    for (int64_t row = begin; row < end; ++row) {
      any_nan |= row * p.k % 4 == 0 ? cast_row(p, caster, x + row * p.row_stride, row)
                                    : fp4_cast_rows_generic(p, row, row + 1);
    }
    return any_nan;
  });
}

void mxfp4_quantize_rows_stochastic_avx512(const Mxfp4QuantizeParams& p, int64_t begin, int64_t end) {
  const StochasticCaster caster = make_caster(kE2M1, NanPolicy::zero);
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    for (int64_t row = begin; row < end; ++row) {
      if (row * p.k % 4 == 0) {
        quantize_row(p, caster, x + row * p.row_stride, row);
      } else {
        mxfp4_quantize_rows_generic(p, row, row + 1);
      }
    }
  });
}

}  // namespace bitmill::detail
