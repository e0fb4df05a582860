// SPDX-License-Identifier: Apache-2.0
// Products of int8 activations (int8.h) with a 1-bit weight: exact integers, then the epilogue of binary_matmul.
//   out = fl(sum over groups, first to last, of fl(fl(scale * row_scale) * dot)) + addend + bias
// A dot product is within 127 k, which k <= kMaxColumns keeps within int32; above 2^24 its conversion to a float
// rounds.
#pragma once

#include <cstdint>

#include "floats.h"
#include "int8.h"
#include "layout.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

struct BinaryInt8MatmulParams {
  const int8_t* q = nullptr;         // [m, k]
  const float* row_scale = nullptr;  // [m]
  const int32_t* weight = nullptr;   // tiles (layout.h)
  const int32_t* weight_nonzero = nullptr;
  int64_t m = 0, n = 0, k = 0;
  const float* scale = nullptr;  // [n, groups]
  int64_t group_size = 0;        // columns a group, a multiple of 32; 0: one group
  Addend addend;
  const float* bias = nullptr;  // [n] or null
  void* out = nullptr;          // [m, n]
  Dtype out_dtype = Dtype::f32;
  ParallelFor parallel_for = serial_for;
};
Status binary_int8_matmul(const BinaryInt8MatmulParams& params);

// The product of rows that are rounded to int8 first, of which every part rounds its own ones: `product` without q and
// row_scale, `quantize` without q, scale and total.
Status binary_int8_linear(const Int8QuantizeParams& quantize, const BinaryInt8MatmulParams& product);

namespace detail {
// Tiles [begin, end) of the output columns, all rows, on this thread. Nothing is checked.
void binary_int8_matmul_tiles(const BinaryInt8MatmulParams& params, int64_t begin, int64_t end);
// The same, by kernel. The one without VNNI is the faster one from a few rows on.
void binary_int8_matmul_tiles_generic(const BinaryInt8MatmulParams& params, int64_t begin, int64_t end);
void binary_int8_matmul_tiles_avx2(const BinaryInt8MatmulParams& params, int64_t begin, int64_t end);
void binary_int8_matmul_tiles_avx512(const BinaryInt8MatmulParams& params, int64_t begin, int64_t end);
void binary_int8_matmul_tiles_avx512vnni(const BinaryInt8MatmulParams& params, int64_t begin, int64_t end);
}  // namespace detail

}  // namespace bitmill
