// SPDX-License-Identifier: Apache-2.0
// Products with a binary weight: of bits with bits to exact integers, with or without the float epilogue, and of floats
// with bits. Weights are tiles (layout.h); `weight_nonzero` (tiles or null) marks weights that are not 0.
#pragma once

#include <cstdint>

#include "floats.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

enum class Operand {
  sign,     // activations -1, +1
  ternary,  // activations -1, 0, +1: `a_nonzero` is given
  bool_     // activations 0, 1
};

// The results as packed rows: what a layer with 1-bit activations reads, so that a chain of layers never returns to
// floats. An output is positive (bit 1) or negative where its dot product lies in the range, and otherwise 0. A range
// is the integers from the first to the last, both included, and wraps: if the last is less, all but those between
// them.
struct BitOutput {
  int32_t* sign = nullptr;            // [m, word_count(n)], or null: no bits are asked for
  int32_t* nonzero = nullptr;         // the same, or null
  const int32_t* positive = nullptr;  // [2, n]: firsts and lasts
  const int32_t* negative = nullptr;  // [2, n], with `nonzero`
  // Dot products outside the ranges that are negative too: [n, single_count], or null. They may be looked for slowly.
  const int32_t* single = nullptr;
  int64_t single_count = 0;
};

struct BinaryMatmulParams {
  const int32_t* a = nullptr;          // [m, word_count(k)]
  const int32_t* a_nonzero = nullptr;  // the same, for Operand::ternary
  Operand operand = Operand::sign;
  const int32_t* weight = nullptr;
  const int32_t* weight_nonzero = nullptr;
  int64_t m = 0, n = 0, k = 0;

  int32_t* dot = nullptr;  // [m, n]: the integers
  BitOutput bits;          // or bits
                           // or, with neither, floats:
  void* out = nullptr;     // [m, n]: fl(fl(scale * dot) + bias), summed over the groups of columns first to last
  Dtype out_dtype = Dtype::f32;
  const float* scale = nullptr;      // [n, groups]
  int64_t group_size = 0;            // columns a group, a multiple of 32; 0: one group
  const float* row_scale = nullptr;  // [m] or null: scale becomes fl(scale * row_scale)
  const float* bias = nullptr;       // [n] or null
  const float* residual = nullptr;   // [m, n] or null: added last; float32 results only
  ParallelFor parallel_for = serial_for;
};
Status binary_matmul(const BinaryMatmulParams& params);
Status check(const BinaryMatmulParams& params);
BinaryMatmulParams rows_of(BinaryMatmulParams params, int64_t begin, int64_t end);
double nanoseconds_per_row(const BinaryMatmulParams& params);

struct BinaryWeightMatmulParams {
  const void* x = nullptr;  // [m, k], contiguous
  Dtype dtype = Dtype::f32;
  const int32_t* weight = nullptr;
  const int32_t* weight_nonzero = nullptr;
  int64_t m = 0, n = 0, k = 0;
  const float* scale = nullptr;  // [n, groups]
  int64_t group_size = 0;        // columns a group, a multiple of 32; 0: one group
  Addend addend;                 // on a CPU
  const float* bias = nullptr;   // [n] or null
  void* out = nullptr;           // [m, n] of `dtype`
  ParallelFor parallel_for = serial_for;
};
Status binary_weight_matmul(const BinaryWeightMatmulParams& params);

namespace detail {
// Tiles [begin, end) of the output columns, all rows, on this thread. Nothing is checked.
void binary_weight_matmul_tiles(const BinaryWeightMatmulParams& params, int64_t begin, int64_t end);
// The same, by kernel.
void binary_matmul_tiles_generic(const BinaryMatmulParams& params, int64_t begin, int64_t end);
void binary_matmul_tiles_neon(const BinaryMatmulParams& params, int64_t begin, int64_t end);
void binary_matmul_tiles_avx2(const BinaryMatmulParams& params, int64_t begin, int64_t end);
void binary_matmul_tiles_avx512(const BinaryMatmulParams& params, int64_t begin, int64_t end);
void binary_matmul_short_avx512vnni(const BinaryMatmulParams& params);
void binary_weight_matmul_tiles_generic(const BinaryWeightMatmulParams& params, int64_t begin, int64_t end);
void binary_weight_matmul_tiles_avx2(const BinaryWeightMatmulParams& params, int64_t begin, int64_t end);
void binary_weight_matmul_tiles_avx512(const BinaryWeightMatmulParams& params, int64_t begin, int64_t end);
}  // namespace detail

}  // namespace bitmill
