// SPDX-License-Identifier: Apache-2.0
// Products with an FP4 weight: of floats, of int8 with a scale a row or a group, and of floats that are rounded to
// those.
#pragma once

#include "fp4.h"
#include "fp4_activations.h"
#include "int8.h"

namespace bitmill {

// y[i, o] = sum_g scale[o, g] sum_{j in g} table[code[o, j]] x[i, j] + bias[o], float sums, columns first to last. With
// int8 activations the sum over a group is one of integers, dot, exact; groups are added first to last to 0, and
//   y[i, o] = fl(row_scale[i] * sum_g fl(fl(scale[o, g] * unit) * float(dot))) + bias[o]     (every operation rounded)
// or, where every group of a row has a scale of its own,
//   y[i, o] = sum_g fl(fl(scale[o, g] * unit) * fl(row_scale[i, g] * float(dot))) + bias[o]
struct Fp4MatmulParams {
  const void* x = nullptr;  // [m, k], contiguous, of `dtype`; int8 if there is a row_scale
  Dtype dtype = Dtype::f32;
  int64_t m = 0;
  const float* row_scale = nullptr;  // [m], or [m, groups], or null: activations are row_scale[i] x[i, j]
  bool grouped_rows = false;         // row_scale is [m, groups]
  Fp4Weight weight;
  const float* bias = nullptr;  // [n] or null
  void* out = nullptr;          // [m, n] of `dtype`
  ParallelFor parallel_for = serial_for;
};
// With int8 activations: bad_argument for a table that fp4_integers refuses or a group wider than fp4_int8_columns.
Status fp4_matmul(const Fp4MatmulParams& params);
// With activations that are made first, of which every part makes its own rows: `product` without x and row_scale, the
// others without q and scales.
Status fp4_int8_linear(const Int8QuantizeParams& quantize, const Fp4MatmulParams& product);
Status fp4_fp4_linear(const Fp4ActivationsParams& cast, const Fp4MatmulParams& product);

namespace detail {
// Tiles [begin, end) of the output columns, all rows.
void fp4_matmul_tiles_generic(const Fp4MatmulParams& params, int64_t begin, int64_t end);
void fp4_int8_matmul_tiles_generic(const Fp4MatmulParams& params, const Fp4Integers& integers, int64_t begin,
                                   int64_t end);
// m and k above 0.
void fp4_matmul_tiles_avx512(const Fp4MatmulParams& params, int64_t begin, int64_t end);
void fp4_matmul_tiles_avx512bf16(const Fp4MatmulParams& params, int64_t begin, int64_t end);
// As above, with sums in another order.
void fp4_matmul_tiles_avx2(const Fp4MatmulParams& params, int64_t begin, int64_t end);
void fp4_int8_matmul_tiles_avx2(const Fp4MatmulParams& params, const Fp4Integers& integers, int64_t begin, int64_t end);
void fp4_int8_matmul_tiles_avx512vnni(const Fp4MatmulParams& params, const Fp4Integers& integers, int64_t begin,
                                      int64_t end);
}  // namespace detail

}  // namespace bitmill
