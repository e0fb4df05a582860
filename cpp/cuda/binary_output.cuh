// SPDX-License-Identifier: Apache-2.0
// What becomes of a dot product: an integer, a float, or bits; the operations of core, one by one.
#pragma once

#include "binary_matmul.h"
#include "bit_output.h"
#include "device.cuh"
#include "launch.cuh"

namespace bitmill::cuda {

__device__ inline void store_as(Dtype dtype, void* out, int64_t index, float value) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(out)[index] = value;
  } else if (dtype == Dtype::bf16) {
    store(value, static_cast<BFloat16*>(out) + index);
  } else {
    store(value, static_cast<Float16*>(out) + index);
  }
}

// A group's part of the sum that `store_sum` finishes.
__device__ inline float group_term(const BinaryMatmulParams& p, int64_t row, int64_t column, int64_t group,
                                   int64_t groups, int32_t dot) {
  float scale = p.scale[column * groups + group];
  if (p.row_scale) scale *= p.row_scale[row];
  return scale * static_cast<float>(dot);
}

__device__ inline void store_sum(const BinaryMatmulParams& p, int64_t row, int64_t column, float value) {
  const int64_t index = row * p.n + column;
  if (p.bias) value += p.bias[column];
  if (p.residual) value += p.residual[index];
  store_as(p.out_dtype, p.out, index, value);
}

// Without groups.
__device__ inline void store_dot(const BinaryMatmulParams& p, int64_t row, int64_t column, int32_t dot) {
  if (p.dot) {
    p.dot[row * p.n + column] = dot;
  } else {
    store_sum(p, row, column, p.k > 0 ? group_term(p, row, column, 0, 1, dot) : 0.0f);
  }
}

struct OutputBits {
  bool sign, nonzero;
};
__device__ inline OutputBits output_bits(const BitOutput& out, int64_t n, int64_t column, int32_t dot) {
  const bool positive = detail::in_range(out.positive[column], out.positive[n + column], dot);
  if (!out.nonzero) return {positive, false};
  bool present = positive || detail::in_range(out.negative[column], out.negative[n + column], dot);
  const int32_t* single = out.single + (out.single ? column * out.single_count : 0);
  for (int64_t i = 0; out.single && i < out.single_count; ++i) present |= single[i] == dot;
  return {positive, present};
}

// core's, of one thread.
__device__ inline void store_half_word(int32_t* plane, int64_t n, int64_t row, int64_t tile, uint32_t bits) {
  auto* const to = reinterpret_cast<uint16_t*>(plane + row * word_count(n)) + tile;
  to[0] = static_cast<uint16_t>(bits);
  if (tile % 2 == 0 && tile + 1 == tile_count(n)) to[1] = 0;  // the other half of this word is past n
}

}  // namespace bitmill::cuda
