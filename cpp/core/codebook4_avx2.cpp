// SPDX-License-Identifier: Apache-2.0
// 4-bit codes of any 16 values with AVX2, bit-equal to the generic form. The code nearest to a value is found by
// halving the middles of neighbours, which are in order: 4 comparisons, each with a middle that those before it choose.
#include <algorithm>
#include <cstring>

#include "codebook4.h"
#include "fp4_cast_avx2.h"

namespace bitmill::detail {
namespace {

// Numbers of places are negative, as comparisons are: entry i of a table of n is that of place -i modulo n.
struct Search {
  __m256 eighth, fourth[2], second, first;
  __m256i code;

  explicit Search(const OrderedCodebook& ordered) {
    alignas(32) float seconds[8], firsts[8];
    LaneBytes codes;
    for (int i = 0; i < 8; ++i) {
      seconds[i] = ordered.middle[1 + 4 * (-i & 3)];
      firsts[i] = ordered.middle[2 * (-i & 7)];
    }
    for (int i = 0; i < 16; ++i) codes.byte[i] = ordered.code[-i & 15];
    eighth = _mm256_set1_ps(ordered.middle[7]);
    fourth[0] = _mm256_set1_ps(ordered.middle[3]);
    fourth[1] = _mm256_set1_ps(ordered.middle[11]);
    second = _mm256_load_ps(seconds);
    first = _mm256_load_ps(firsts);
    code = both_lanes(codes);
  }

  // Minus the number of middles below each value.
  __m256i operator()(__m256 z) const {
    const auto below = [&](__m256 middle) { return _mm256_cmp_ps(middle, z, _CMP_LT_OQ); };
    const auto next = [](__m256i place, __m256 mask) {
      return _mm256_add_epi32(_mm256_add_epi32(place, place), _mm256_castps_si256(mask));
    };
    const __m256 half = below(eighth);
    const __m256i four = next(_mm256_castps_si256(half), below(_mm256_blendv_ps(fourth[0], fourth[1], half)));
    const __m256i eight = next(four, below(_mm256_permutevar_ps(second, four)));
    return next(eight, below(_mm256_permutevar8x32_ps(first, eight)));
  }
};

// 32 values to 16 bytes.
template <class T>
void quantize_block(const Search& search, const T* x, float inverse, uint8_t* packed) {
  const auto places = [&](int i) { return search(_mm256_mul_ps(load8(x + i), _mm256_set1_ps(inverse))); };
  const __m256i left = _mm256_packs_epi32(places(0), places(8)), right = _mm256_packs_epi32(places(16), places(24));
  const __m256i place = _mm256_and_si256(_mm256_packs_epi16(left, right), _mm256_set1_epi8(15));
  const __m128i bytes = join_codes(_mm256_shuffle_epi8(search.code, place));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), bytes);
}

// Calls f(x, columns) for the whole blocks of 32 values and for those that are left, with zeros behind them.
template <class T, class F>
void each_block(const T* x, int64_t count, const F& f) {
  int64_t column = 0;
  for (; column + 32 <= count; column += 32) f(x + column, column, int64_t{32});
  if (column == count) return;
  T last[32] = {};
  std::memcpy(last, x + column, static_cast<size_t>(count - column) * sizeof(T));
  f(last, column, count - column);
}

template <class T>
uint32_t largest_magnitude(const T* x, int64_t count) {
  __m256i largest[4] = {};
  each_block(x, count, [&](const T* values, int64_t, int64_t) {
    for (int i = 0; i < 4; ++i) largest[i] = _mm256_max_epu32(largest[i], magnitudes(load8(values + 8 * i)));
  });
  return highest(_mm256_max_epu32(_mm256_max_epu32(largest[0], largest[1]), _mm256_max_epu32(largest[2], largest[3])));
}

template <class T>
void quantize_group(const Search& search, const T* x, int64_t count, const ScaledGroup& scaled, uint8_t* packed) {
  if (scaled.scale != scaled.scale) {
    std::fill_n(packed, ceil_div(count, 2), uint8_t{0});
    return;
  }
  each_block(x, count, [&](const T* values, int64_t column, int64_t columns) {
    if (columns == 32) return quantize_block(search, values, scaled.inverse, packed + column / 2);
    uint8_t bytes[16];
    quantize_block(search, values, scaled.inverse, bytes);
    if (columns % 2) bytes[columns / 2] &= 15;
    std::memcpy(packed + column / 2, bytes, static_cast<size_t>(ceil_div(columns, 2)));
  });
}

}  // namespace

void codebook4_quantize_rows_avx2(const Codebook4QuantizeParams& p, const OrderedCodebook& ordered, uint32_t largest,
                                  int64_t begin, int64_t end) {
  const Search search(ordered);
  const int64_t groups = p.groups(), bytes = ceil_div(p.k, 2);
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * p.width(), left = p.k - first, count = left < p.width() ? left : p.width();
        const auto* values = x + row * p.row_stride + first;
        const ScaledGroup scaled = codebook4_scaled(largest_magnitude(values, count), largest);
        p.scale[row * groups + group] = scaled.scale;
        quantize_group(search, values, count, scaled, p.packed + row * bytes + first / 2);
      }
    }
  });
}

void codebook4_dequantize_rows_avx2(const Codebook4DequantizeParams& p, int64_t begin, int64_t end) {
  const Fp4RowLookup<4> lookup(p.codebook);
  const int64_t width = p.group_size > 0 ? p.group_size : p.k, groups = p.k > 0 ? ceil_div(p.k, width) : 0;
  for (int64_t row = begin; row < end; ++row) {
    const float* scale = p.scale + row * groups;
    int64_t group_end = width;
    uncast_row(lookup, p.packed + row * ceil_div(p.k, 2), p.k, p.values + row * p.k,
               [&](int64_t block, int i, __m256 v) {
                 const int64_t column = 32 * block + 8 * i;  // past k they have any scale
                 if (column >= group_end && group_end < p.k) ++scale, group_end += width;
                 return _mm256_mul_ps(v, _mm256_broadcast_ss(scale));
               });
  }
  _mm_sfence();
}

}  // namespace bitmill::detail
