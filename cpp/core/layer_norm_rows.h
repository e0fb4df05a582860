// SPDX-License-Identifier: Apache-2.0
// Layer normalisation in vectors of 8, for some rows at once: each vector of a row waits for the one before it.
#pragma once

#include "avx2.h"
#include "layer_norm.h"
#include "layer_norm_moments.h"

namespace bitmill::detail {

// One vector of one row, or one value of 8 rows. The argument makes it a type of its own in every file.
template <class Set>
struct Lanes {
  using Value = __m256;
  static Value all(float x) { return _mm256_set1_ps(x); }
  static Value add(Value a, Value b) { return _mm256_add_ps(a, b); }
  static Value subtract(Value a, Value b) { return _mm256_sub_ps(a, b); }
  static Value multiply(Value a, Value b) { return _mm256_mul_ps(a, b); }
  static Value divide(Value a, Value b) { return _mm256_div_ps(a, b); }
  static Value fma(Value a, Value b, Value c) { return _mm256_fmadd_ps(a, b, c); }
};

// One vector of each row, as many rows in a register as fit. A set has Register and kPerRegister, all, subtract and
// fma; load(rows, i), the vectors at i of the first kPerRegister of them; row(z, r); and scale, see below.
template <class Set>
struct LanesOfRows {
  static constexpr int64_t kRegisters = 4, kRows = kRegisters * Set::kPerRegister;
  struct Value {
    typename Set::Register part[kRegisters];

    __m256 row(int64_t r) const { return Set::row(part[r / Set::kPerRegister], r % Set::kPerRegister); }
  };
  template <class Operation>
  static Value each(const Operation& operation) {
    Value z;
    for (int64_t i = 0; i < kRegisters; ++i) z.part[i] = operation(i);
    return z;
  }
  static Value all(float x) {
    return each([&](int64_t) { return Set::all(x); });
  }
  static Value subtract(const Value& a, const Value& b) {
    return each([&](int64_t i) { return Set::subtract(a.part[i], b.part[i]); });
  }
  static Value fma(const Value& a, const Value& b, const Value& c) {
    return each([&](int64_t i) { return Set::fma(a.part[i], b.part[i], c.part[i]); });
  }
};

// `count` rows of x to out.
template <class Set>
static void normalize(const LayerNormParams& p, const float* x, int64_t count, float* out) {
  using One = Lanes<Set>;  // of one row; and then one value of each row
  using Rows = LanesOfRows<Set>;
  const int64_t vectors = p.n / kNormLanes, whole = vectors * kNormLanes;
  const float* row[kNormLanes];
  for (int64_t r = 0; r < kNormLanes; ++r) row[r] = x + (r < count ? r : count - 1) * p.n;  // past the last, it again
  Cascade<One> cascade[Rows::kRows];
  for (auto& each : cascade) each.begin(vectors);
  for (int64_t first = 0; first < vectors; first += kNormBlock) {
    const int64_t size = vectors - first < kNormBlock ? vectors - first : kNormBlock;
    const auto block = moments_of_block<Rows>(size, [&](int64_t i) {
      return Rows::each(
          [&](int64_t part) { return Set::load(row + part * Set::kPerRegister, (first + i) * kNormLanes); });
    });
    for (int64_t r = 0; r < Rows::kRows; ++r) cascade[r].add({size, block.mean.row(r), block.squares.row(r)});
  }
  float mean[kNormLanes][kNormLanes] = {}, squares[kNormLanes][kNormLanes] = {};  // [row][lane]
  for (int64_t r = 0; r < Rows::kRows; ++r) {
    const auto& lanes = cascade[r].sum();
    _mm256_storeu_ps(mean[r], lanes.mean);
    _mm256_storeu_ps(squares[r], lanes.squares);
  }
  const auto gather = [](const auto& of, int64_t i) {
    return _mm256_setr_ps(of[0][i], of[1][i], of[2][i], of[3][i], of[4][i], of[5][i], of[6][i], of[7][i]);
  };
  const auto moments = moments_of_row<One>(
      whole, p.n, [&](int64_t i) { return gather(row, i); },
      [&](int64_t i) { return Moments<One>{vectors, gather(mean, i), gather(squares, i)}; });
  const __m256 variance = _mm256_div_ps(moments.squares, One::all(static_cast<float>(p.n)));
  const __m256 deviation = _mm256_sqrt_ps(_mm256_add_ps(_mm256_max_ps(One::all(0.0f), variance), One::all(p.eps)));
  float center[kNormLanes], scale[kNormLanes];
  _mm256_storeu_ps(center, moments.mean);
  _mm256_storeu_ps(scale, _mm256_div_ps(One::all(1.0f), deviation));
  for (int64_t r = 0; r < count; ++r) Set::scale(row[r], p.n, center[r], scale[r], p.weight, p.bias, out + r * p.n);
}

template <class Set>
static void layer_norm_rows(const LayerNormParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kRows = LanesOfRows<Set>::kRows;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t count = end - row < kRows ? end - row : kRows;
    normalize<Set>(p, p.x + row * p.n, count, p.out + row * p.n);
  }
}

}  // namespace bitmill::detail
