// SPDX-License-Identifier: Apache-2.0
// Images to bits and results to planes with AVX2: a lane is a pixel. Bit-equal to the generic form.
#include <cstring>

#include "avx2.h"
#include "binary_conv.h"
#include "binary_conv_planes.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

// One bit for each of 16 pixels.
struct Bits {
  __m256i low, high;

  template <int predicate>
  void add(__m256 x, __m256 y, __m256 bound, __m256i bit) {
    const auto chosen = [&](__m256 z) {
      return _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(z, bound, predicate)), bit);
    };
    low = _mm256_or_si256(low, chosen(x));
    high = _mm256_or_si256(high, chosen(y));
  }
  void put(uint32_t* words) const {
    store_bits(words, low);
    store_bits(words + kPixels / 2, high);
  }
};

struct Avx2 {
  template <Levels levels, class T>
  static void collect(const PixelBlock<T>& block, uint32_t* sign, uint32_t* nonzero) {
    const __m256 zero = _mm256_setzero_ps(), threshold = _mm256_set1_ps(block.threshold);
    const __m256i none = _mm256_setzero_si256();
    __m256i bit = _mm256_set1_epi32(1);
    Bits signs{none, none}, present = signs;
    T part[kPixels] = {};
    const T* x = block.x;
    for (int64_t channel = 0; channel < block.channels; ++channel, x += block.plane) {
      const bool whole = block.pixels == kPixels;
      if (!whole) std::memcpy(part, x, static_cast<size_t>(block.pixels) * sizeof(T));
      const T* from = whole ? x : part;
      __m256 low = load8(from), high = load8(from + kPixels / 2);
      if (block.shift) {
        const __m256 shift = _mm256_set1_ps(block.shift[channel]);
        low = _mm256_add_ps(low, shift);
        high = _mm256_add_ps(high, shift);
      }
      if constexpr (levels == Levels::sign) {
        signs.add<_CMP_GT_OQ>(low, high, zero, bit);
        present.add<_CMP_NEQ_OQ>(low, high, zero, bit);
      } else if constexpr (levels == Levels::plus) {
        signs.add<_CMP_GE_OQ>(low, high, zero, bit);
      } else {
        signs.add<_CMP_GT_OQ>(low, high, threshold, bit);
      }
      bit = _mm256_add_epi32(bit, bit);
    }
    signs.put(sign);
    present.put(nonzero);
  }
};

// 8 rows of 8 values to 8 columns.
void transpose8(const float* in, int64_t row_width, float* out, int64_t stride) {
  const auto halves = [&](int64_t row, int64_t column) {  // of rows `row` and `row` + 4
    const __m128 low = _mm_loadu_ps(in + row * row_width + column);
    return _mm256_insertf128_ps(_mm256_castps128_ps256(low), _mm_loadu_ps(in + (row + 4) * row_width + column), 1);
  };
  for (int64_t column = 0; column < 8; column += 4) {
    const __m256 a = halves(0, column), b = halves(1, column), c = halves(2, column), d = halves(3, column);
    const __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
    const __m256 next_ab = _mm256_unpackhi_ps(a, b), next_cd = _mm256_unpackhi_ps(c, d);
    float* to = out + column * stride;
    _mm256_storeu_ps(to, _mm256_shuffle_ps(ab, cd, 0x44));
    _mm256_storeu_ps(to + stride, _mm256_shuffle_ps(ab, cd, 0xEE));
    _mm256_storeu_ps(to + 2 * stride, _mm256_shuffle_ps(next_ab, next_cd, 0x44));
    _mm256_storeu_ps(to + 3 * stride, _mm256_shuffle_ps(next_ab, next_cd, 0xEE));
  }
}

}  // namespace

int64_t pack_planes_avx2(const BinaryConvParams& p, int64_t sample, int64_t group, int64_t y, int32_t* sign,
                         int32_t* nonzero) {
  return pack_planes<Avx2>(p, sample, group, y, sign, nonzero);
}

void store_planes_avx2(Dtype dtype, const void* in, int64_t rows, int64_t row_width, int64_t first, int64_t count,
                       void* out, int64_t stride) {
  if (dtype != Dtype::f32) return store_planes_generic(dtype, in, rows, row_width, first, count, out, stride);
  const float* const values = static_cast<const float*>(in);
  float* const columns = static_cast<float*>(out);
  const int64_t whole_rows = rows & ~int64_t{7}, whole_columns = count & ~int64_t{7};
  for (int64_t row = 0; row < whole_rows; row += 8) {
    for (int64_t column = 0; column < whole_columns; column += 8) {
      transpose8(values + row * row_width + first + column, row_width, columns + column * stride + row, stride);
    }
  }
  store_planes_generic(dtype, values + whole_rows * row_width, rows - whole_rows, row_width, first, whole_columns,
                       columns + whole_rows, stride);
  store_planes_generic(dtype, values, rows, row_width, first + whole_columns, count - whole_columns,
                       columns + whole_columns * stride, stride);
}

}  // namespace bitmill::detail
