// SPDX-License-Identifier: Apache-2.0
// The partially binarised product and its dense form against a double reference, and arrays that contradict each other.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "layout.h"
#include "salient_scatter.h"

namespace {

using namespace bitmill;

// Parts of two, in reverse: what any number of threads may do to the order.
void reversed_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  if (middle < end) body(context, middle, end);
  if (begin < middle) body(context, begin, middle);
}

struct Case {
  int64_t n, k, group_size = 0;
  double fraction = 0.1;
  bool codes = true, centred = true;
};

struct Weight {
  std::vector<int32_t> sign, mask, start;
  std::vector<uint8_t> code;
  std::vector<Float16> half;
  std::vector<float> value_scale, value_zero, alpha, mu;
  std::vector<double> dense;  // the reference [n, k]
  SalientWeight view;
};

Weight make(const Case& c, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  Weight w;
  const int64_t words = word_count(c.k), groups = c.group_size > 0 ? ceil_div(c.k, c.group_size) : 1;
  w.sign.assign(tile_count(c.n) * words * kTileRows, 0);
  w.mask = w.sign;
  w.start.assign(c.n + 1, 0);
  for (int64_t row = 0; row < c.n; ++row) {
    w.value_scale.push_back(0.01f + std::fabs(uniform(random)) * 0.02f);
    w.value_zero.push_back(std::round(127.0f + 100.0f * uniform(random)));
    for (int64_t group = 0; group < groups; ++group) {
      w.alpha.push_back(std::fabs(uniform(random)));
      w.mu.push_back(uniform(random) * 0.1f);
    }
    for (int64_t column = 0; column < c.k; ++column) {
      const int64_t word = ((row / kTileRows) * words + column / 32) * kTileRows + row % kTileRows;
      const int32_t bit = static_cast<int32_t>(1u << (column % 32));
      if ((uniform(random) + 1) / 2 < c.fraction) {
        w.mask[word] |= bit;
        w.code.push_back(static_cast<uint8_t>(random() % 256));
        w.half.emplace_back();
        store(uniform(random) * 3, &w.half.back());
        w.dense.push_back(c.codes ? double(w.value_scale[row]) * (double(w.code.back()) - w.value_zero[row])
                                  : double(to_float(w.half.back())));
      } else {
        const bool plus = random() % 2;
        if (plus) w.sign[word] |= bit;
        const int64_t i = row * groups + (c.group_size > 0 ? column / c.group_size : 0);
        w.dense.push_back((c.centred ? double(w.mu[i]) : 0.0) + (plus ? 1.0 : -1.0) * double(w.alpha[i]));
      }
    }
    w.start[row + 1] = static_cast<int32_t>(w.code.size());
  }
  w.view.sign = w.sign.data();
  w.view.mask = w.mask.data();
  w.view.value = c.codes ? static_cast<const void*>(w.code.data()) : w.half.data();
  w.view.start = w.start.data();
  w.view.value_scale = c.codes ? w.value_scale.data() : nullptr;
  w.view.value_zero = c.codes ? w.value_zero.data() : nullptr;
  w.view.alpha = w.alpha.data();
  w.view.mu = c.centred ? w.mu.data() : nullptr;
  w.view.n = c.n;
  w.view.k = c.k;
  w.view.entries = static_cast<int64_t>(w.code.size());
  w.view.group_size = c.group_size;
  return w;
}

template <class T>
void check_matmul(const Case& c, int64_t m, Dtype dtype, double rounding, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  const Weight w = make(c, random);
  std::vector<T> x(m * c.k), out(m * c.n), again(m * c.n);
  for (T& value : x) store(uniform(random), &value);
  std::vector<float> bias(c.n);
  for (float& value : bias) value = uniform(random);
  SalientMatmulParams p;
  p.weight = w.view;
  p.x = x.data();
  p.dtype = dtype;
  p.m = m;
  p.bias = m % 2 ? bias.data() : nullptr;
  p.out = out.data();
  CHECK(salient_matmul(p) == Status::ok);
  p.parallel_for = reversed_for;
  p.out = again.data();
  CHECK(salient_matmul(p) == Status::ok);
  double worst = 0;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t output = 0; output < c.n; ++output) {
      double sum = p.bias ? bias[output] : 0.0, magnitude = std::fabs(sum);
      for (int64_t column = 0; column < c.k; ++column) {
        const double term = double(to_float(x[row * c.k + column])) * w.dense[output * c.k + column];
        sum += term;
        magnitude += std::fabs(term);
      }
      const double error = std::fabs(double(to_float(out[row * c.n + output])) - sum);
      worst = std::max(worst, error / (magnitude * 1e-5 + std::fabs(sum) * rounding + 1e-6));
      CHECK(to_float(out[row * c.n + output]) == to_float(again[row * c.n + output]));
    }
  }
  CHECK(worst <= 1);
}

void check_dequantize(const Case& c, std::mt19937& random) {
  const Weight w = make(c, random);
  std::vector<float> dense(c.n * c.k);
  CHECK(salient_dequantize(w.view, dense.data(), reversed_for) == Status::ok);
  for (size_t i = 0; i < dense.size(); ++i) CHECK(std::fabs(double(dense[i]) - w.dense[i]) <= 1e-6);
}

Status status_of(const Weight& w, SalientWeight view) {
  std::vector<float> x(view.k > 0 ? 2 * view.k : 0, 1.0f), out(view.n > 0 ? 2 * view.n : 0);
  SalientMatmulParams p;
  p.weight = view;
  p.x = x.data();
  p.m = 2;
  p.out = out.data();
  std::vector<float> dense(w.dense.size());
  const Status status = salient_matmul(p);
  CHECK(salient_dequantize(view, dense.data(), serial_for) == status);
  return status;
}

void check_hostile(std::mt19937& random) {
  const Weight w = make({.n = 19, .k = 70, .fraction = 0.3}, random);
  CHECK(status_of(w, w.view) == Status::ok);
  const auto with_start = [&](auto change) {
    std::vector<int32_t> start = w.start;
    change(start);
    SalientWeight view = w.view;
    view.start = start.data();
    return status_of(w, view);
  };
  CHECK(with_start([](auto& s) { s[0] = 1; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s[0] = -1; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s.back() += 1; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { std::swap(s[4], s[9]); }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s[5] += 1; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s[5] = 2147483647; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s[5] = -2147483647 - 1; }) == Status::corrupt);
  const auto with_bits = [&](const std::vector<int32_t>& mask, const std::vector<int32_t>& sign) {
    SalientWeight view = w.view;
    view.mask = mask.data();
    view.sign = sign.data();
    return status_of(w, view);
  };
  const int64_t lane = kTileRows + 2,
                last = 2 * kTileRows + 2;  // words of row 2: columns 32 ... 63, and 64 ... 95
  std::vector<int32_t> mask = w.mask, sign = w.sign;
  mask[lane] ^= 1;
  CHECK(with_bits(mask, w.sign) == Status::corrupt);
  mask = w.mask;
  std::fill(mask.begin(), mask.end(), -1);
  CHECK(with_bits(mask, w.sign) == Status::corrupt);
  mask = w.mask;
  mask[last] |= static_cast<int32_t>(~0u << 6);  // past k
  mask[3 * kTileRows + kTileRows - 1] = -1;      // past n: row 31
  CHECK(with_bits(mask, w.sign) == Status::ok);
  sign[lane] = w.mask[lane];  // a sign bit of a salient weight
  if (w.mask[lane]) CHECK(with_bits(w.mask, sign) == Status::corrupt);
  SalientWeight view = w.view;
  view.entries -= 1;
  CHECK(status_of(w, view) == Status::corrupt);
  view = w.view;
  view.value_zero = nullptr;
  CHECK(status_of(w, view) == Status::bad_argument);
  view = w.view;
  view.group_size = 16;
  CHECK(status_of(w, view) == Status::bad_argument);
  view = w.view;
  view.n = -1;
  CHECK(status_of(w, view) == Status::bad_size);
  view = w.view;
  view.k = kMaxColumns + 1;
  CHECK(salient_check(view, serial_for) == Status::bad_size);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const Case cases[] = {{.n = 1, .k = 1},
                        {.n = 2, .k = 7, .codes = false},
                        {.n = 15, .k = 31, .centred = false},
                        {.n = 16, .k = 32, .group_size = 32},
                        {.n = 17, .k = 33, .group_size = 32, .codes = false},
                        {.n = 33, .k = 64, .fraction = 0.0},
                        {.n = 20, .k = 65, .fraction = 1.1},
                        {.n = 100, .k = 197, .group_size = 64},
                        {.n = 5, .k = 768, .group_size = 1024},
                        {.n = 0, .k = 40},
                        {.n = 3, .k = 0},
                        {.n = 3, .k = 0, .group_size = 32}};
  for (const Case& c : cases) {
    check_dequantize(c, random);
    for (const int64_t m : {0, 1, 2, 17, 300}) check_matmul<float>(c, m, Dtype::f32, 1e-6, random);
    check_matmul<BFloat16>(c, 3, Dtype::bf16, 0x1p-8, random);
    check_matmul<Float16>(c, 4, Dtype::f16, 0x1p-11, random);
  }
  check_hostile(random);
  return bitmill_test::failures() != 0;
}
