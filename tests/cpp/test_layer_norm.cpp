// SPDX-License-Identifier: Apache-2.0
// Layer normalisation against sums in double precision, each instruction set against the generic form, in place and in
// parts; and steps of rows against the same steps one by one.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "layout.h"
#include "row_steps.h"
#include "threads.h"

using namespace bitmill;
using bitmill_test::scattered_for;

namespace {

std::mt19937 random_bits(3);

std::vector<float> random_floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(static_cast<int32_t>(random_bits())) / 1e9f;
  return values;
}

std::vector<int32_t> random_words(int64_t count) {
  std::vector<int32_t> words(static_cast<size_t>(count));
  for (int32_t& word : words) word = static_cast<int32_t>(random_bits());
  return words;
}

// A buffer's bits: NaN equals itself.
bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

void normalizes(int64_t m, int64_t n) {
  const auto x = random_floats(m * n), weight = random_floats(n), bias = random_floats(n);
  std::vector<float> want(x.size());
  LayerNormParams p;
  p.x = x.data();
  p.m = m;
  p.n = n;
  p.weight = weight.data();
  p.bias = bias.data();
  p.eps = 1e-3f;
  p.out = want.data();
  select(InstructionSet::generic);
  CHECK(layer_norm(p) == Status::ok);
  for (int64_t row = 0; row < m; ++row) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < n; ++i) mean += x[row * n + i] / static_cast<double>(n);
    for (int64_t i = 0; i < n; ++i) variance += std::pow(x[row * n + i] - mean, 2) / static_cast<double>(n);
    for (int64_t i = 0; i < n; ++i) {
      const double z = (x[row * n + i] - mean) / std::sqrt(variance + 1e-3) * weight[i] + bias[i];
      CHECK(std::fabs(z - want[row * n + i]) < 1e-5 * (1 + std::fabs(z)));
    }
  }
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    for (const ParallelFor parallel_for : {serial_for, scattered_for}) {
      std::vector<float> out(x.size()), in_place = x;
      p.parallel_for = parallel_for;
      p.x = x.data();
      p.out = out.data();
      CHECK(layer_norm(p) == Status::ok && same(out, want));
      p.x = p.out = in_place.data();
      CHECK(layer_norm(p) == Status::ok && same(in_place, want));
    }
  }
  select(best());
}

// A product, a normalisation of its result, and the packing of that.
void steps_are_what_they_are_one_by_one(int64_t m) {
  const int64_t n = 40, k = 64;
  const auto a = random_words(m * word_count(k)), tiles = random_words(tile_count(n) * word_count(k) * kTileRows);
  const auto scale = random_floats(n), weight = random_floats(n), bias = random_floats(n);
  const auto run = [&](bool together, ParallelFor parallel_for) {
    std::vector<float> out(static_cast<size_t>(m * n));
    std::vector<int32_t> sign(static_cast<size_t>(m * word_count(n)));
    BinaryMatmulParams product;
    product.a = a.data();
    product.weight = tiles.data();
    product.m = m;
    product.n = n;
    product.k = k;
    product.scale = scale.data();
    product.out = out.data();
    LayerNormParams norm;
    norm.x = norm.out = out.data();
    norm.m = m;
    norm.n = n;
    norm.weight = weight.data();
    norm.bias = bias.data();
    BitpackParams pack;
    pack.x = out.data();
    pack.m = m;
    pack.k = pack.row_stride = n;
    pack.levels = Levels::plus;
    pack.sign = sign.data();
    product.parallel_for = norm.parallel_for = pack.parallel_for = parallel_for;
    const RowStep steps[] = {product, norm, pack};
    if (together) {
      CHECK(row_steps(steps) == Status::ok);
    } else {
      CHECK(binary_matmul(product) == Status::ok && layer_norm(norm) == Status::ok && bitpack(pack) == Status::ok);
    }
    return std::pair{out, sign};
  };
  const auto want = run(false, serial_for);
  for (const ParallelFor parallel_for : {serial_for, scattered_for}) {
    const auto got = run(true, parallel_for);
    CHECK(same(got.first, want.first) && got.second == want.second);
  }
}

}  // namespace

int main() {
  for (const int64_t n : {1, 3, 7, 8, 9, 16, 17, 40, 127, 128, 129, 255, 384, 768, 1403}) {
    for (const int64_t m : {0, 1, 2, 4, 7, 8, 21}) normalizes(m, n);
  }
  for (const int64_t m : {0, 1, 63, 64, 130, 600}) steps_are_what_they_are_one_by_one(m);

  LayerNormParams bad;
  bad.n = -1;
  CHECK(layer_norm(bad) == Status::bad_size);
  bad.n = 1;
  bad.m = 100;
  CHECK(layer_norm(bad) == Status::bad_argument);  // no pointers
  BitpackParams other;
  other.m = 99;
  const RowStep mixed[] = {bad, other}, failing[] = {bad};
  CHECK(row_steps(mixed) == Status::bad_size);
  CHECK(row_steps(failing) == Status::bad_argument);
  CHECK(row_steps({}) == Status::ok);
  return bitmill_test::failures() != 0;
}
