// SPDX-License-Identifier: Apache-2.0
// The partially binarised weight: signs with a scale and a mean for most weights, and a scattered set of salient ones
// that keep 8 bits or a float16 (layout.h). Its product with float activations, and its dense form.
//   w[r, c] = salient(r, c) ? value : mu[r, g(c)] + alpha[r, g(c)] b[r, c],   b = -1, +1
//   value = value_scale[r] (code - value_zero[r]) of a uint8 code, or the float16 itself
#pragma once

#include <cstdint>

#include "floats.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

struct SalientWeight {
  const int32_t* sign = nullptr;       // tiles; bit 0 where the weight is salient
  const int32_t* mask = nullptr;       // tiles; bits past n or k are ignored
  const void* value = nullptr;         // [entries]: uint8 with value_scale and value_zero, float16 without
  const int32_t* start = nullptr;      // [n + 1]
  const float* value_scale = nullptr;  // [n] or null
  const float* value_zero = nullptr;   // [n] or null
  const float* alpha = nullptr;        // [n, groups]
  const float* mu = nullptr;           // [n, groups] or null: 0
  int64_t n = 0, k = 0, entries = 0;
  int64_t group_size = 0;  // columns that share alpha and mu, a multiple of 32; 0: one group
};

struct SalientMatmulParams {
  SalientWeight weight;
  const void* x = nullptr;  // [m, k], contiguous
  Dtype dtype = Dtype::f32;
  int64_t m = 0;
  const float* bias = nullptr;  // [n] or null
  void* out = nullptr;          // [m, n] of `dtype`
  ParallelFor parallel_for = serial_for;
};
Status salient_matmul(const SalientMatmulParams& params);

// The dense weight, float32 [n, k].
Status salient_dequantize(const SalientWeight& weight, float* dense, ParallelFor parallel_for);

// Everything that the two functions above rely on, so that they never leave the arrays whatever a file says:
// Status::corrupt unless `start` rises from 0 to `entries`, every row of the mask has as many bits as `start`
// gives it entries, and no salient weight has a sign bit.
Status salient_check(const SalientWeight& weight, ParallelFor parallel_for);

}  // namespace bitmill
