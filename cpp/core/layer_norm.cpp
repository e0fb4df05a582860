// SPDX-License-Identifier: Apache-2.0
// The obvious form of layer normalisation, lane by lane, and the choice of the instruction set.
#include "layer_norm.h"

#include <algorithm>
#include <cmath>

#include "cpu.h"
#include "layer_norm_moments.h"

namespace bitmill {
namespace detail {
namespace {

struct Scalar {
  using Value = float;
  static float all(float x) { return x; }
  static float add(float a, float b) { return a + b; }
  static float subtract(float a, float b) { return a - b; }
  static float multiply(float a, float b) { return a * b; }
  static float divide(float a, float b) { return a / b; }
  static float fma(float a, float b, float c) { return std::fma(a, b, c); }
};

}  // namespace

void layer_norm_rows_generic(const LayerNormParams& p, int64_t begin, int64_t end) {
  const int64_t vectors = p.n / kNormLanes;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = p.x + row * p.n;
    const auto lane = [&](int64_t i) {
      Cascade<Scalar> cascade;
      cascade.begin(vectors);
      for (int64_t first = 0; first < vectors; first += kNormBlock) {
        cascade.add(moments_of_block<Scalar>(std::min(kNormBlock, vectors - first),
                                             [&](int64_t j) { return x[(first + j) * kNormLanes + i]; }));
      }
      return cascade.sum();
    };
    const auto moments =
        moments_of_row<Scalar>(vectors * kNormLanes, p.n, [&](int64_t column) { return x[column]; }, lane);
    const float variance = moments.squares / static_cast<float>(p.n);
    const float scale = 1.0f / std::sqrt(std::max(variance, 0.0f) + p.eps);
    for (int64_t column = 0; column < p.n; ++column) {
      p.out[row * p.n + column] = std::fma((x[column] - moments.mean) * scale, p.weight[column], p.bias[column]);
    }
  }
}

namespace {

auto* choose_kernel() {
  switch (selected()) {
#ifdef BITMILL_EIGHT_LANES
    case InstructionSet::neon:
    case InstructionSet::avx2:
      return layer_norm_rows_avx2;
#endif
#ifdef BITMILL_AVX512
    case InstructionSet::avx512:
      return layer_norm_rows_avx512;
#endif
    default:
      return layer_norm_rows_generic;
  }
}

}  // namespace
}  // namespace detail

Status layer_norm(const LayerNormParams& p) {
  if (p.m < 0 || p.n < 0 || p.n > kMaxColumns) return Status::bad_size;
  if (p.m == 0 || p.n == 0) return Status::ok;
  if (!p.x || !p.weight || !p.bias || !p.out) return Status::bad_argument;
  auto* rows = detail::choose_kernel();
  split_rows(p.parallel_for, p.m, nanoseconds_per_row(p), [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  return Status::ok;
}

double nanoseconds_per_row(const LayerNormParams& p) { return static_cast<double>(p.n) * 0.1; }

LayerNormParams rows_of(LayerNormParams p, int64_t begin, int64_t end) {
  p.m = end - begin;
  p.x += begin * p.n;
  p.out += begin * p.n;
  return p;
}

}  // namespace bitmill
