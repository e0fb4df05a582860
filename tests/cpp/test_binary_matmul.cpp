// SPDX-License-Identifier: Apache-2.0
// The binary products against sums of single products, on every instruction set this machine has and with the
// work split in parts, with buffers of exactly the needed size.
#include <algorithm>
#include <cmath>
#include <vector>

#include "binary_matmul.h"
#include "bitpack.h"
#include "check.h"
#include "cpu.h"
#include "layout.h"
#include "probe.h"
#include "problems.h"
#include "threads.h"

using namespace bitmill;
using namespace bitmill_test;

namespace {

template <class T>
void check_halves(BinaryMatmulParams p, Dtype dtype, const std::vector<float>& out) {
  std::vector<T> halves(out.size());
  p.out = halves.data();
  p.out_dtype = dtype;
  CHECK(binary_matmul(p) == Status::ok);
  for (size_t i = 0; i < out.size(); ++i) {
    T want;
    store(out[i], &want);
    CHECK(halves[i].bits == want.bits);
  }
}

void multiplies(const Problem& problem) {
  const auto [m, n, k, operand, weight_zeros, group_size] = problem;
  std::vector<int8_t> a = random_levels(m * k, operand, operand == Operand::ternary);
  for (int64_t i = 0; m > 16 && operand == Operand::ternary && i < m * k; ++i) {  // most rows have no zero
    if (a[i] == 0 && i / k % 16 != 5) a[i] = 1;
  }
  std::vector<int8_t> w = random_levels(n * k, Operand::sign, weight_zeros);
  for (int64_t i = 0; n > 32 && i < n * k; ++i) {  // some tiles have no zero
    if (w[i] == 0 && i / k / kTileRows % 3 == 1) w[i] = 1;
  }
  const auto a_bits = rows_of(a, m, k, positive), a_nonzero = rows_of(a, m, k, present);
  const auto w_bits = tiles_of(w, n, k, positive), w_nonzero = tiles_of(w, n, k, present);
  const int64_t width = group_size > 0 ? group_size : std::max<int64_t>(k, 1);
  const int64_t groups = group_size > 0 ? ceil_div(k, group_size) : 1;
  std::vector<float> scale(n * groups), bias(n), row_scale(m);
  for (auto* values : {&scale, &bias, &row_scale}) {
    for (float& value : *values) value = static_cast<float>(static_cast<int32_t>(random_bits())) / 3e9f;
  }
  std::vector<int32_t> dot(m * n);
  std::vector<float> residual(m * n), out[2][2];  // [with row_scale][with residual]
  for (float& value : residual) value = static_cast<float>(static_cast<int32_t>(random_bits())) / 3e9f;
  for (const bool scaled : {false, true}) {
    for (const bool added : {false, true}) out[scaled][added].resize(m * n);
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t o = 0; o < n; ++o) {
      float value[2] = {};
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int64_t c = g * width; c < std::min(k, (g + 1) * width); ++c) sum += a[i * k + c] * w[o * k + c];
        dot[i * n + o] += sum;
        for (const bool scaled : {false, true}) {
          const float factor = scaled ? scale[o * groups + g] * row_scale[i] : scale[o * groups + g];
          const float part = factor * static_cast<float>(sum);
          value[scaled] = g == 0 ? part : value[scaled] + part;
        }
      }
      for (const bool scaled : {false, true}) {
        out[scaled][false][i * n + o] = value[scaled] + bias[o];
        out[scaled][true][i * n + o] = value[scaled] + bias[o] + residual[i * n + o];
      }
    }
  }

  std::vector<int32_t> positive_range(2 * n), negative_range(2 * n), single(3 * n), sign(m * word_count(n)),
      nonzero(sign.size());
  for (int64_t o = 0; o < 2 * n; ++o) {
    positive_range[o] = static_cast<int32_t>(random_bits() % (2 * k + 3)) - static_cast<int32_t>(k) - 1;
    negative_range[o] = static_cast<int32_t>(random_bits() % (2 * k + 3)) - static_cast<int32_t>(k) - 1;
  }
  for (int32_t& dot_product : single) {
    dot_product = static_cast<int32_t>(random_bits() % (2 * k + 3)) - static_cast<int32_t>(k) - 1;
  }
  std::vector<int32_t> nonzero_with_single(sign.size());
  for (int64_t i = 0; i < m * n; ++i) {
    const int64_t o = i % n, word = i / n * word_count(n) + o / 32;
    const auto inside = [&](const std::vector<int32_t>& range) {
      const int32_t first = range[o], last = range[n + o];
      return first <= last ? first <= dot[i] && dot[i] <= last : dot[i] >= first || dot[i] <= last;
    };
    const bool above = inside(positive_range), below = inside(negative_range);
    sign[word] |= static_cast<int32_t>(static_cast<uint32_t>(above) << (o % 32));
    nonzero[word] |= static_cast<int32_t>(static_cast<uint32_t>(above || below) << (o % 32));
    const bool alone = std::count(single.begin() + 3 * o, single.begin() + 3 * (o + 1), dot[i]) > 0;
    nonzero_with_single[word] |= static_cast<int32_t>(static_cast<uint32_t>(above || below || alone) << (o % 32));
  }

  BinaryMatmulParams p;
  p.a = a_bits.data();
  p.a_nonzero = operand == Operand::ternary ? a_nonzero.data() : nullptr;
  p.operand = operand;
  p.weight = w_bits.data();
  p.weight_nonzero = weight_zeros ? w_nonzero.data() : nullptr;
  p.m = m;
  p.n = n;
  p.k = k;
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    for (const ParallelFor parallel : {serial_for, scattered_for}) {
      p.parallel_for = parallel;
      std::vector<int32_t> got(m * n, -1);
      p.dot = got.data();
      CHECK(binary_matmul(p) == Status::ok && got == dot);
      p.dot = nullptr;
      std::vector<int32_t> sign_bits(sign.size(), -1), nonzero_bits(sign.size(), -1);
      p.bits = {sign_bits.data(), nonzero_bits.data(), positive_range.data(), negative_range.data()};
      CHECK(m == 0 || (binary_matmul(p) == Status::ok && sign_bits == sign && nonzero_bits == nonzero));
      p.bits.single = single.data();
      p.bits.single_count = 3;
      CHECK(m == 0 || (binary_matmul(p) == Status::ok && sign_bits == sign && nonzero_bits == nonzero_with_single));
      p.bits = {};
      p.scale = scale.data();
      p.bias = bias.data();
      p.group_size = group_size;
      for (const bool scaled : {false, true}) {
        p.row_scale = scaled ? row_scale.data() : nullptr;
        p.out_dtype = Dtype::f32;
        for (const bool added : {false, true}) {
          std::vector<float> floats(m * n, NAN);
          p.out = floats.data();
          p.residual = added ? residual.data() : nullptr;
          CHECK(binary_matmul(p) == Status::ok && floats == out[scaled][added]);
        }
        p.residual = nullptr;
        check_halves<BFloat16>(p, Dtype::bf16, out[scaled][false]);
        check_halves<Float16>(p, Dtype::f16, out[scaled][false]);
      }
      p.row_scale = nullptr;
      p.group_size = 0;
    }
  }

  // Float activations: the sum of k products, within the rounding of k additions.
  std::vector<float> x(m * k), y(m * n);
  for (float& value : x) value = static_cast<float>(static_cast<int32_t>(random_bits())) / 2e9f;
  BinaryWeightMatmulParams q;
  q.x = x.data();
  q.weight = p.weight;
  q.weight_nonzero = p.weight_nonzero;
  q.m = m;
  q.n = n;
  q.k = k;
  q.scale = scale.data();
  q.group_size = group_size;
  q.bias = bias.data();
  q.out = y.data();
  std::vector<float> addend(tile_count(n) * m * kTileRows, NAN);  // NaN past n
  const auto added = [&](int64_t i, int64_t o) -> float& {
    return addend[((o / kTileRows) * m + i) * kTileRows + o % kTileRows];
  };
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t o = 0; o < n; ++o) added(i, o) = static_cast<float>(static_cast<int32_t>(random_bits())) / 2e9f;
  }
  if (m % 2 == 1) q.addend = {addend.data(), m};
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    q.parallel_for = scattered_for;
    std::fill(y.begin(), y.end(), NAN);
    CHECK(binary_weight_matmul(q) == Status::ok);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t o = 0; o < n; ++o) {
        const double other = q.addend ? double{added(i, o)} : 0.0;
        double want = bias[o] + other, magnitude = std::fabs(bias[o]) + std::fabs(other);
        for (int64_t c = 0; c < k; ++c) {
          const double term = static_cast<double>(scale[o * groups + c / width]) * x[i * k + c] * w[o * k + c];
          want += term;
          magnitude += std::fabs(term);
        }
        CHECK(std::fabs(y[i * n + o] - want) <= 1e-6 * static_cast<double>(k + 2) * (magnitude + 1e-6));
      }
    }
  }
  select(best());
}

}  // namespace

int main() {
  for_each_product(multiplies);
  BinaryMatmulParams p;
  p.m = -1;
  CHECK(binary_matmul(p) == Status::bad_size);
  p.m = 1;
  p.k = kMaxColumns + 1;
  CHECK(binary_matmul(p) == Status::bad_size);
  p.n = p.k = 1;
  CHECK(binary_matmul(p) == Status::bad_argument);  // neither integers nor floats are asked for
  p.operand = Operand::ternary;
  CHECK(binary_matmul(p) == Status::bad_argument);  // without its nonzero plane
  CHECK(binary_matmul_seconds(3, 20, 40, 2) > 0);
  return bitmill_test::failures() != 0;
}
