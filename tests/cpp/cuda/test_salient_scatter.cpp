// SPDX-License-Identifier: Apache-2.0
// The kernels of the partially binarised product, against sums in double, and with arrays that contradict each other.
#include "../check.h"
#include "../salient_problems.h"
#include "cuda_runtime.h"
#include "launchers.h"
#include "salient_scatter.h"

using namespace bitmill_test;

namespace {

constexpr SalientEncoding kEncodings[] = {SalientEncoding::bitmap, SalientEncoding::list, SalientEncoding::columns};

template <class T>
std::vector<T> multiply(const SalientWeight& weight, const std::vector<T>& x, Dtype dtype, int64_t m,
                        const std::vector<float>& bias) {
  const int64_t groups = weight.group_size > 0 ? ceil_div(weight.k, weight.group_size) : 1;
  std::vector<float> signs(m * weight.n), totals(weight.mu ? m * groups : 0);
  std::vector<T> out(m * weight.n);
  SalientMatmulParams p;
  p.weight = weight;
  p.x = x.data();
  p.dtype = dtype;
  p.m = m;
  p.bias = m % 2 ? bias.data() : nullptr;
  p.out = out.data();
  CHECK(cuda::launch_salient_matmul(p, signs.data(), totals.data(), nullptr) == Status::ok);
  return out;
}

template <class T>
void multiplies(const Case& c, int64_t m, Dtype dtype, double rounding, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  const Weight w = make(c, random);
  std::vector<T> x(m * c.k);
  for (T& value : x) store(uniform(random), &value);
  std::vector<float> bias(c.n);
  for (float& value : bias) value = uniform(random);
  const std::vector<T> out = multiply(w.view, x, dtype, m, bias);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t output = 0; output < c.n; ++output) {
      double sum = m % 2 ? bias[output] : 0.0, magnitude = std::fabs(sum);
      for (int64_t column = 0; column < c.k; ++column) {
        const double term = double(to_float(x[row * c.k + column])) * w.dense[output * c.k + column];
        sum += term;
        magnitude += std::fabs(term);
      }
      const double error = std::fabs(double(to_float(out[row * c.n + output])) - sum);
      CHECK(error <= magnitude * 1e-5 + std::fabs(sum) * rounding + 1e-5);
    }
  }
}

// Codes of 4 bits, two to a byte, in the order of the codes of 8 bits.
void multiplies_pairs(const Case& c, std::mt19937& random) {
  Weight w = make(c, random);
  std::vector<uint8_t> pairs((w.code.size() + 1) / 2);
  for (size_t i = 0; i < w.code.size(); ++i) {
    w.code[i] &= 15;
    pairs[i / 2] = static_cast<uint8_t>(pairs[i / 2] | w.code[i] << (i % 2 * 4));
  }
  SalientWeight narrow = w.view;
  narrow.code_bits = 4;
  narrow.value = pairs.data();
  if (c.encoding == SalientEncoding::bitmap) narrow.entries += narrow.entries % 2;
  const std::vector<float> x(3 * c.k, 0.5f), bias(c.n, 1.0f);
  CHECK(multiply(narrow, x, Dtype::f32, 3, bias) == multiply(w.view, x, Dtype::f32, 3, bias));
}

// Whatever is in arrays of the right sizes: any answer, but no read outside of them.
void stays_inside(const Case& c, std::mt19937& random) {
  Weight w = make(c, random);
  for (auto* words : {&w.sign, &w.mask, &w.tiles, &w.start, &w.column}) {
    for (int32_t& word : *words) word = static_cast<int32_t>(random());
  }
  for (uint8_t& gap : w.gap) gap = static_cast<uint8_t>(random());
  multiply(w.view, std::vector<float>(3 * c.k, 1.0f), Dtype::f32, 3, std::vector<float>(c.n));
}

}  // namespace

int main() {
  std::mt19937 random(5);
  for (Case c : kSalientCases) {
    for (const auto encoding : kEncodings) {
      c.encoding = encoding;
      emulation::last_to_first = !emulation::last_to_first;
      for (const int64_t m : {0, 1, 5}) multiplies<float>(c, m, Dtype::f32, 1e-6, random);
      multiplies<BFloat16>(c, 3, Dtype::bf16, 0x1p-8, random);
      multiplies<Float16>(c, 1, Dtype::f16, 0x1p-11, random);
    }
  }
  for (const auto encoding : kEncodings) {
    for (const int64_t k : {33, 70, 600}) {
      stays_inside({.n = 19, .k = k, .fraction = 0.3, .encoding = encoding}, random);
      stays_inside({.n = 19, .k = k, .fraction = 0.3, .codes = false, .encoding = encoding}, random);
      if (encoding != SalientEncoding::columns) {
        multiplies_pairs({.n = 19, .k = k, .fraction = 0.3, .encoding = encoding}, random);
      }
    }
  }
  SalientMatmulParams p;
  p.int8 = true;
  CHECK(cuda::launch_salient_matmul(p, nullptr, nullptr, nullptr) == Status::bad_argument);
  return failures() != 0;
}
