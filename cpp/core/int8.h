// SPDX-License-Identifier: Apache-2.0
// Rows of floats to int8 with one scale a row: the activations of every integer product with packed weights.
//   amax = max |x|,  scale = fl(amax / 127),  q = rint(fl(x * fl(127 / amax))), which is within -127 ... 127
// Ties go to even. Where the product is not finite (a row of zeros, an infinity, amax below 4e-37) q is 0; a NaN in the
// row makes its scale NaN, so that it reaches the result.
#pragma once

#include <cstdint>

#include "floats.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

struct Int8QuantizeParams {
  const void* x = nullptr;  // [m, k], contiguous
  Dtype dtype = Dtype::f32;
  int64_t m = 0, k = 0;
  int8_t* q = nullptr;       // [m, k]
  float* scale = nullptr;    // [m]
  int32_t* total = nullptr;  // [m] or null: the sum of a row of q, which k <= kMaxColumns keeps within int32
  ParallelFor parallel_for = serial_for;
};
Status int8_quantize(const Int8QuantizeParams& params);
// Some of the rows, to other places.
Int8QuantizeParams rounded_to(Int8QuantizeParams params, int64_t row, int64_t rows, int8_t* q, float* scale,
                              ParallelFor parallel_for);

namespace detail {
void int8_quantize_rows_generic(const Int8QuantizeParams& params, int64_t begin, int64_t end);
void int8_quantize_rows_avx2(const Int8QuantizeParams& params, int64_t begin, int64_t end);
void int8_quantize_rows_avx512(const Int8QuantizeParams& params, int64_t begin, int64_t end);
}  // namespace detail

}  // namespace bitmill
