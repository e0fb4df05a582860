// SPDX-License-Identifier: Apache-2.0
// Inputs of binary attention that the tests of core and of its kernels for GPUs share.
#pragma once

#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "binary_attention.h"

namespace bitmill_test {

using namespace bitmill;

inline std::mt19937 random_bits(3);

inline float random_float(bool zeros) {
  if (zeros && random_bits() % 5 == 0) return 0.0f;
  return static_cast<float>(static_cast<int32_t>(random_bits() | 1)) / 1e9f;
}

// [batch, rows, columns] floats, contiguous or with columns far apart.
struct FloatOperand {
  std::vector<float> values;
  std::vector<int64_t> offset;
  Matrices matrices;
  int64_t rows, columns;

  FloatOperand(int64_t batch, int64_t rows_, int64_t columns_, bool zeros, bool transposed)
      : rows(rows_), columns(columns_) {
    values.resize(batch * rows * columns);
    for (float& value : values) value = random_float(zeros);
    for (int64_t b = 0; b < batch; ++b) offset.push_back(b * rows * columns);
    matrices = {values.data(), offset.data(), transposed ? 1 : columns, transposed ? rows : 1};
  }
  float at(int64_t b, int64_t row, int64_t column) const {
    return values[offset[b] + row * matrices.row_stride + column * matrices.column_stride];
  }
  int sign(int64_t b, int64_t row, int64_t column, bool zeros) const {
    const float x = at(b, row, column);
    return x > 0 || (x == 0 && !zeros) ? 1 : x < 0 ? -1 : 0;
  }
};

struct Problem {
  int64_t batch, n, m, d, e;
  AttentionRule rule;
  bool zeros;      // sgn(0) = 0
  bool has_zeros;  // in q, k and v
  int mask;        // 0: none, 1: bool for all rows, 2: bool for each, 3: additive, 4: with a bias
  bool transposed;
};

inline constexpr float kBeta = 0.25f;

// The inputs of a problem, and the params that lead to them.
struct AttentionCase {
  Problem problem;
  FloatOperand q, k, v;
  std::vector<float> bias, floats, out, addend;
  std::vector<uint8_t> keep;
  std::vector<int64_t> offset, zero_offset, of, addend_offset;
  BinaryAttentionParams p;

  explicit AttentionCase(const Problem& wanted)
      : problem(wanted),
        q(wanted.batch, wanted.n, wanted.d, wanted.has_zeros, wanted.transposed),
        k(wanted.batch, wanted.m, wanted.d, wanted.has_zeros, wanted.transposed),
        v(wanted.batch, wanted.m, wanted.e, wanted.has_zeros, wanted.transposed) {
    const auto [batch, n, m, d, e, rule, zeros, has_zeros, mask, transposed] = problem;
    bias.resize(n * m);
    floats.resize(n * m);
    out.resize(batch * n * e);
    keep.resize(n * m);
    for (int64_t i = 0; i < n * m; ++i) {
      const bool dropped = mask > 0 && (mask == 1 && i >= m ? keep[i % m] == 0 : random_bits() % 3 == 0 || i / m == 4);
      keep[i] = !dropped;
      bias[i] = floats[i] = dropped ? -2e4f : mask == 4 ? random_float(false) : 0.0f;
    }
    offset.resize(batch);
    zero_offset.resize(1);
    of.resize(batch);
    addend_offset.resize(batch);
    for (int64_t b = 0; b < batch; ++b) offset[b] = b * e;  // rows of all matrices side by side
    std::iota(addend_offset.begin(), addend_offset.end(), int64_t{0});
    p.batch = batch;
    p.n = n;
    p.m = m;
    p.d = d;
    p.e = e;
    p.q = q.matrices;
    p.k = k.matrices;
    p.v = v.matrices;
    p.zeros = zeros;
    if (mask > 0) {
      p.mask.boolean = mask <= 2;
      p.mask.values = {p.mask.boolean ? static_cast<const void*>(keep.data()) : floats.data(), zero_offset.data(), m,
                       1};
      p.mask.count = 1;
      p.mask.rows = mask == 1 ? 1 : n;
      p.mask.of = of.data();
    }
    p.rule = rule;
    p.divide = random_bits() % 2 == 0;
    p.scale = std::sqrt(static_cast<float>(d));
    if (!p.divide) p.scale = 1 / p.scale;
    p.gap = std::log(1 / kBeta);
    p.slope = 0.83 / std::sqrt(static_cast<double>(d));
    p.threshold = 0.9 / static_cast<double>(m + 1);
    p.step = rule == AttentionRule::elastic ? 0.37f : 1.0f;
    addend.resize(batch * m);  // whole numbers: their sum is exact in every order
    for (float& value : addend) value = static_cast<float>(random_bits() % 100);
    if (rule == AttentionRule::elastic && transposed) {
      p.value_addend = {addend.data(), addend_offset.data(), batch, 1};
      p.addend_step = 0.7f;
    }
    p.out = out.data();
    p.out_offset = offset.data();
    p.out_row_stride = batch * e;
  }
};

// Packed rows [rows, heads * columns / 32], and the floats that they stand for, [head][rows][columns].
struct PackedOperand {
  std::vector<int32_t> sign, nonzero;
  std::vector<float> values;
  AttentionRows rows;

  PackedOperand(int64_t count, int64_t heads, int64_t columns, bool zeros) {
    const int64_t words = heads * columns / 32;
    sign.resize(count * words);
    nonzero.resize(zeros ? sign.size() : 0);
    values.resize(32 * sign.size());
    for (int64_t i = 0; i < count * words; ++i) {
      const uint32_t present = zeros ? static_cast<uint32_t>(random_bits() | random_bits()) : ~0u;
      const uint32_t bits = static_cast<uint32_t>(random_bits()) & present;
      sign[i] = static_cast<int32_t>(bits);
      if (zeros) nonzero[i] = static_cast<int32_t>(present);
      for (int64_t bit = 0; bit < 32; ++bit) {
        const int64_t column = i % words * 32 + bit, head = column / columns;
        const int value = (present >> bit & 1u) == 0 ? 0 : (bits >> bit & 1u) ? 1 : -1;
        values[(head * count + i / words) * columns + column % columns] = static_cast<float>(value);
      }
    }
    rows = {heads * columns / 32, sign.data(), zeros ? nonzero.data() : nullptr};
  }
};

template <class Test>
void for_each_attention(const Test& test) {
  const int64_t shapes[][5] = {{1, 1, 1, 1, 1},     {2, 5, 33, 15, 9},    {1, 37, 64, 32, 64},  {3, 6, 31, 64, 17},
                               {2, 4, 97, 65, 80},  {1, 2, 200, 100, 33}, {2, 0, 5, 7, 3},      {2, 5, 0, 7, 3},
                               {2, 5, 7, 7, 0},     {0, 5, 7, 7, 3},      {1, 3, 16, 130, 130}, {1, 7, 230, 224, 32},
                               {1, 8, 96, 127, 97}, {1, 9, 70, 128, 160}, {1, 1, 65, 225, 64}};
  for (const auto& shape : shapes) {
    for (const AttentionRule rule : {AttentionRule::bool_, AttentionRule::softmax_aware, AttentionRule::elastic}) {
      for (int mask = 0; mask < 5; ++mask) {
        for (const int options : {0, 1, 2, 3, 5}) {
          const auto [batch, n, m, d, e] = shape;
          test(Problem{batch, n, m, d, e, rule, (options & 1) != 0, (options & 2) != 0, mask, (options & 4) != 0});
        }
      }
    }
  }
}

}  // namespace bitmill_test
