// SPDX-License-Identifier: Apache-2.0
// Stochastic casts to FP4, MXFP4 and NVFP4 with AVX2, bit-equal to the generic form: 32 values at a time with the
// random numbers of 8 blocks of Philox.
#include "fp4_cast_avx2.h"
#include "nvfp4.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kValues = 32;

__m256i all(uint64_t word) { return _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(word))); }

// -1 where a < b, as unsigned numbers.
__m256i below(__m256i a, __m256i b) {
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  return _mm256_cmpgt_epi32(_mm256_xor_si256(b, sign), _mm256_xor_si256(a, sign));
}

// Upper and lower halves of 8 products.
void multiply(__m256i a, __m256i factor, __m256i& upper, __m256i& lower) {
  const __m256i evens = _mm256_mul_epu32(a, factor), odds = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  upper = _mm256_blend_epi32(_mm256_srli_epi64(evens, 32), odds, 0xAA);
  lower = _mm256_blend_epi32(evens, _mm256_slli_epi64(odds, 32), 0xAA);
}

// The words of blocks [block, block + 8), in order. Lane 4 i + j has block 2 j + i, so that transposing 4 x 4 does it.
void philox8(uint64_t block, RandomStream stream, uint32_t* out) {
  const __m256i lane = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  __m256i c0 = _mm256_add_epi32(all(block), lane);
  __m256i c1 = _mm256_sub_epi32(all(block >> 32), below(c0, lane));
  __m256i c2 = all(stream.offset), c3 = all(stream.offset >> 32), k0 = all(stream.seed), k1 = all(stream.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    __m256i a_upper, a_lower, b_upper, b_lower;
    multiply(c0, all(0xD2511F53u), a_upper, a_lower);
    multiply(c2, all(0xCD9E8D57u), b_upper, b_lower);
    c0 = _mm256_xor_si256(_mm256_xor_si256(b_upper, c1), k0);
    c1 = b_lower;
    c2 = _mm256_xor_si256(_mm256_xor_si256(a_upper, c3), k1);
    c3 = a_lower;
    k0 = _mm256_add_epi32(k0, all(0x9E3779B9u));
    k1 = _mm256_add_epi32(k1, all(0xBB67AE85u));
  }
  const __m256i a = _mm256_unpacklo_epi32(c0, c1), b = _mm256_unpackhi_epi32(c0, c1);
  const __m256i c = _mm256_unpacklo_epi32(c2, c3), d = _mm256_unpackhi_epi32(c2, c3);
  const auto put = [&](int i, __m256i words) { store_bits(out + 8 * i, words); };
  put(0, _mm256_unpacklo_epi64(a, c));
  put(1, _mm256_unpackhi_epi64(a, c));
  put(2, _mm256_unpacklo_epi64(b, d));
  put(3, _mm256_unpackhi_epi64(b, d));
}

// The numbers of elements from one on, which may lie within a block.
class RandomRow {
 public:
  RandomRow(RandomStream stream, uint64_t element) : stream_(stream), block_(element / 4), skipped_(element % 4) {
    if (skipped_ > 0) philox8(block_, stream_, words_ + kValues);
  }
  // Those of the next 32 elements.
  const uint32_t* next() {
    if (skipped_ > 0) {
      std::memcpy(words_, words_ + kValues, sizeof(words_) / 2);
      philox8(block_ + 8, stream_, words_ + kValues);
    } else {
      philox8(block_, stream_, words_);
    }
    block_ += 8;
    return words_ + skipped_;
  }

 private:
  RandomStream stream_;
  uint64_t block_, skipped_;
  uint32_t words_[2 * kValues];
};

// The codes toward zero by exponent and mantissa bits as many as the format's, from the last ones of code 0 on.
struct StochasticCaster {
  __m256i index, lowest, nan_code;
  __m256 value, inverse, largest;
  int shift;
};

StochasticCaster make_caster(Fp4Format format, NanPolicy nan) {
  const Fp4Steps steps = fp4_steps(format, Rounding::stochastic);
  const Fp4Distances distances = fp4_distances(format);
  const int shift = 23 - format.mantissa_bits;
  const uint32_t lowest = (steps.first[0] >> shift) - 1;
  LaneBytes index;
  for (uint32_t i = 0; i < 16; ++i) index.byte[i] = static_cast<uint8_t>(fp4_code((lowest + i) << shift, steps));
  return {both_lanes(index),
          all(lowest),
          all(nan == NanPolicy::max ? 7 : 0),
          _mm256_loadu_ps(distances.value),
          _mm256_loadu_ps(distances.inverse),
          _mm256_set1_ps(distances.value[7]),
          shift};
}

// Numbers below 2^32 toward zero.
__m256i to_unsigned(__m256 x) {
  const __m256 half = _mm256_set1_ps(0x1p31f), large = _mm256_cmp_ps(x, half, _CMP_GE_OQ);
  const __m256i rest = _mm256_cvttps_epi32(_mm256_sub_ps(x, _mm256_and_ps(large, half)));
  return _mm256_xor_si256(rest, _mm256_slli_epi32(_mm256_castps_si256(large), 31));
}

// 8 codes; sets bits of `nans` if a value is NaN.
__m256i codes_of(const StochasticCaster& caster, __m256 x, const uint32_t* random, uint32_t& nans) {
  const __m256i bits = _mm256_castps_si256(x), magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
  const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
  nans |= static_cast<uint32_t>(_mm256_movemask_epi8(nan));
  const __m256i upper_bits = _mm256_srl_epi32(magnitude, _mm_cvtsi32_si128(caster.shift));
  const __m256i above_lowest = _mm256_sub_epi32(_mm256_max_epu32(upper_bits, caster.lowest), caster.lowest);
  // The other bytes of a lane look up entry 0, which is 0.
  const __m256i index = _mm256_shuffle_epi8(caster.index, _mm256_min_epu32(above_lowest, _mm256_set1_epi32(15)));
  const __m256 within = _mm256_min_ps(_mm256_castsi256_ps(magnitude), caster.largest);  // NaN becomes the largest
  const __m256 above = _mm256_sub_ps(within, _mm256_permutevar8x32_ps(caster.value, index));
  const __m256i chance = to_unsigned(_mm256_mul_ps(above, _mm256_permutevar8x32_ps(caster.inverse, index)));
  const __m256i words = load_bits(random);
  const __m256i rounded = _mm256_sub_epi32(index, below(_mm256_add_epi32(chance, words), chance));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 28), _mm256_set1_epi32(8));
  return _mm256_blendv_epi8(_mm256_or_si256(rounded, sign), caster.nan_code, nan);
}

// 32 values x, every `width` of them times a number, to 16 bytes.
template <int width, class T>
void cast_block(const StochasticCaster& caster, const T* x, const float* factor, const uint32_t* random,
                uint8_t* packed, uint32_t& nans) {
  const auto codes = [&](int i) {
    const __m256 scaled = _mm256_mul_ps(load8(x + 8 * i), _mm256_broadcast_ss(factor + 8 * i / width));
    return codes_of(caster, scaled, random + 8 * i, nans);
  };
  const __m256i left = _mm256_packus_epi32(codes(0), codes(1)), right = _mm256_packus_epi32(codes(2), codes(3));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), join_codes(_mm256_packus_epi16(left, right)));
}

// A row of k values. scaled(x, column, factor): the factors of the 32 values from a column on; those past k are 0.
template <int width, class T, class Scaled>
void cast_row(const StochasticCaster& caster, const T* x, int64_t k, RandomRow random, uint8_t* packed,
              const Scaled& scaled, uint32_t& nans) {
  for (int64_t column = 0; column < k; column += kValues) {
    const int64_t left = k - column;
    T last[kValues] = {};
    uint8_t bytes[kValues / 2];
    if (left < kValues) std::memcpy(last, x + column, static_cast<size_t>(left) * sizeof(T));
    const T* values = left < kValues ? last : x + column;
    float factor[kValues / width];
    scaled(values, column, factor);
    cast_block<width>(caster, values, factor, random.next(), bytes, nans);
    std::memcpy(packed + column / 2, bytes, static_cast<size_t>(ceil_div(left < kValues ? left : kValues, 2)));
  }
}

template <class T>
uint32_t largest_magnitude(const T* x, int count) {
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < count; i += 8) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(load8(x + i)), _mm256_set1_epi32(0x7FFFFFFF));
    largest = _mm256_max_epu32(largest, bits);
  }
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xB1))));
}

// Blocks of `width` values; scaled_block(amax) is their ScaledBlock.
template <int width, class Params, class Scaled>
void quantize_rows(const Params& p, int64_t begin, int64_t end, const Scaled& scaled_block) {
  const StochasticCaster caster = make_caster(kE2M1, NanPolicy::zero);
  const int64_t blocks = ceil_div(p.k, width);
  with_dtype(p.dtype, p.x, [&]<class T>(const T* x) {
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* scale = p.scale + row * blocks;
      const auto scaled = [&](const T* values, int64_t column, float* factor) {
        for (int i = 0; i < kValues / width; ++i) {
          const ScaledBlock block = scaled_block(largest_magnitude(values + width * i, width));
          const int64_t at = column / width + i;
          if (at < blocks) scale[at] = block.byte;
          factor[i] = block.valid ? block.inverse : std::numeric_limits<float>::quiet_NaN();  // makes code 0
        }
      };
      uint32_t nans = 0;
      cast_row<width>(caster, x + row * p.row_stride, p.k, RandomRow(p.random, static_cast<uint64_t>(row * p.k)),
                      p.packed + row * ceil_div(p.k, 2), scaled, nans);
    }
  });
}

}  // namespace

bool fp4_cast_rows_stochastic_avx2(const Fp4CastParams& p, int64_t begin, int64_t end) {
  const StochasticCaster caster = make_caster(p.format, p.nan);
  return with_dtype(p.dtype, p.x, [&]<class T>(const T* x) {
    uint32_t nans = 0;
    for (int64_t row = begin; row < end; ++row) {
      cast_row<kValues>(
          caster, x + row * p.row_stride, p.k, RandomRow(p.random, static_cast<uint64_t>(row * p.k)),
          p.packed + row * ceil_div(p.k, 2), [](const T*, int64_t, float* factor) { *factor = 1.0f; }, nans);
    }
    return nans != 0;
  });
}

void mxfp4_quantize_rows_stochastic_avx2(const Mxfp4QuantizeParams& p, int64_t begin, int64_t end) {
  quantize_rows<kMxBlock>(p, begin, end, [&](uint32_t amax) { return mxfp4_scaled(amax, p.rule); });
}

void nvfp4_quantize_rows_stochastic_avx2(const Nvfp4QuantizeParams& p, int64_t begin, int64_t end) {
  const float global_scale = p.global_scale ? *p.global_scale : 1.0f;
  quantize_rows<kNvBlock>(p, begin, end, [&](uint32_t amax) { return nvfp4_scaled(amax, global_scale); });
}

}  // namespace bitmill::detail
