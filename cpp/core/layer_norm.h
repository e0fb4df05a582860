// SPDX-License-Identifier: Apache-2.0
// Layer normalisation of rows, (x - mean) / sqrt(variance + eps) * weight + bias, with the bits of torch's own kernel
// for x86: a block that normalises inside must not differ from one that asks torch. The order of operations is
// therefore torch's; see layer_norm_moments.h.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "status.h"

namespace bitmill {

struct LayerNormParams {
  const float* x = nullptr;  // [m, n]
  int64_t m = 0, n = 0;
  const float* weight = nullptr;  // [n]
  const float* bias = nullptr;    // [n]
  float eps = 0.0f;
  float* out = nullptr;  // [m, n]; may be x
  ParallelFor parallel_for = serial_for;
};
Status layer_norm(const LayerNormParams& params);
LayerNormParams rows_of(LayerNormParams params, int64_t begin, int64_t end);
double nanoseconds_per_row(const LayerNormParams& params);

namespace detail {
void layer_norm_rows_generic(const LayerNormParams& params, int64_t begin, int64_t end);
void layer_norm_rows_avx2(const LayerNormParams& params, int64_t begin, int64_t end);
void layer_norm_rows_avx512(const LayerNormParams& params, int64_t begin, int64_t end);
}  // namespace detail

}  // namespace bitmill
