// SPDX-License-Identifier: Apache-2.0
// Images to bits and results to planes with AVX-512: a lane is a pixel. Bit-equal to the generic form.
#include "avx512.h"
#include "binary_conv.h"
#include "binary_conv_planes.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

struct Avx512 {
  template <Levels levels, class T>
  static void collect(const PixelBlock<T>& block, uint32_t* sign, uint32_t* nonzero) {
    const __mmask16 lanes = first_lanes(block.pixels);
    const __m512 zero = _mm512_setzero_ps(), threshold = _mm512_set1_ps(block.threshold);
    __m512i bit = _mm512_set1_epi32(1), signs = _mm512_setzero_si512(), present = signs;
    const T* x = block.x;
    for (int64_t channel = 0; channel < block.channels; ++channel, x += block.plane) {
      __m512 z = lanes == 0xFFFF ? load16(x) : load16(x, lanes);
      if (block.shift) z = _mm512_add_ps(z, _mm512_set1_ps(block.shift[channel]));
      if constexpr (levels == Levels::sign) {
        signs = _mm512_mask_or_epi32(signs, _mm512_cmp_ps_mask(z, zero, _CMP_GT_OQ), signs, bit);
        present = _mm512_mask_or_epi32(present, _mm512_cmp_ps_mask(z, zero, _CMP_NEQ_OQ), present, bit);
      } else if constexpr (levels == Levels::plus) {
        signs = _mm512_mask_or_epi32(signs, _mm512_cmp_ps_mask(z, zero, _CMP_GE_OQ), signs, bit);
      } else {
        signs = _mm512_mask_or_epi32(signs, _mm512_cmp_ps_mask(z, threshold, _CMP_GT_OQ), signs, bit);
      }
      bit = _mm512_add_epi32(bit, bit);
    }
    _mm512_storeu_si512(sign, signs);
    _mm512_storeu_si512(nonzero, present);
  }
};

}  // namespace

int64_t pack_planes_avx512(const BinaryConvParams& p, int64_t sample, int64_t group, int64_t y, int32_t* sign,
                           int32_t* nonzero) {
  return pack_planes<Avx512>(p, sample, group, y, sign, nonzero);
}

void store_planes_avx512(Dtype dtype, const void* in, int64_t rows, int64_t row_width, int64_t first, int64_t count,
                         void* out, int64_t stride) {
  if (dtype != Dtype::f32) return store_planes_generic(dtype, in, rows, row_width, first, count, out, stride);
  const float* const values = static_cast<const float*>(in);
  float* const columns = static_cast<float*>(out);
  const int64_t whole_rows = rows & ~int64_t{15}, whole_columns = count & ~int64_t{15};
  for (int64_t row = 0; row < whole_rows; row += 16) {
    for (int64_t column = 0; column < whole_columns; column += 16) {
      transpose16(values + row * row_width + first + column, row_width, columns + column * stride + row, stride);
    }
  }
  store_planes_generic(dtype, values + whole_rows * row_width, rows - whole_rows, row_width, first, whole_columns,
                       columns + whole_rows, stride);
  store_planes_generic(dtype, values, rows, row_width, first + whole_columns, count - whole_columns,
                       columns + whole_columns * stride, stride);
}

}  // namespace bitmill::detail
