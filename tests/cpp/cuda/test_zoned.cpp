// SPDX-License-Identifier: Apache-2.0
// The kernels of the zoned product, against sums in double, and with arrays that contradict each other.
#include <cmath>
#include <random>

#include "../check.h"
#include "../zoned_problems.h"
#include "cuda_runtime.h"
#include "launchers.h"

using namespace bitmill_test;

namespace {

template <class T>
std::vector<T> multiply(const ZonedWeight& weight, const std::vector<T>& x, Dtype dtype, int64_t m,
                        const std::vector<float>& bias) {
  std::vector<cuda::ZonedPlace> places(ceil_div(weight.k, weight.block));
  std::vector<T> out(m * weight.n), ordered(weight.column_scale ? 0 : m * weight.k);
  std::vector<float> scaled(weight.column_scale ? m * weight.k : 0);
  ZonedMatmulParams p;
  p.weight = weight;
  p.x = x.data();
  p.dtype = dtype;
  p.m = m;
  p.bias = m % 2 ? bias.data() : nullptr;
  p.out = out.data();
  void* scratch = weight.column_scale ? static_cast<void*>(scaled.data()) : ordered.data();
  CHECK(cuda::launch_zoned_matmul(p, places.data(), scratch, nullptr) == Status::ok);
  return out;
}

template <class T>
void multiplies(const Form& form, int64_t m, Dtype dtype, double rounding) {
  emulation::last_to_first = !emulation::last_to_first;
  const Weight w = make(form);
  std::vector<T> x(m * form.k);
  for (T& value : x) store(next_float(), &value);
  std::vector<float> bias(form.n);
  for (float& value : bias) value = next_float();
  const std::vector<T> out = multiply(w.view, x, dtype, m, bias);
  for (int64_t i = 0; i < m * form.n; ++i) {
    double sum = m % 2 ? bias[i % form.n] : 0.0, size = 1.0;
    for (int64_t c = 0; c < form.k; ++c) {
      const double value = to_float(x[i / form.n * form.k + c]);
      sum += value * w.dense[i % form.n * form.k + c];
      size += std::abs(value) * 15.0;
    }
    CHECK(std::abs(to_float(out[i]) - sum) <= 1e-6 * size + rounding * std::abs(sum));
  }
}

// Whatever is in arrays of the right sizes: any answer, but no read outside of them.
void stays_inside(const Form& form) {
  std::mt19937 random(7);
  Weight w = make(form);
  for (auto* words : {&w.sign, &w.zone, &w.salient, &w.salient_zone}) {
    for (int32_t& word : *words) word = static_cast<int32_t>(random());
  }
  multiply(w.view, std::vector<float>(3 * form.k, 1.0f), Dtype::f32, 3, std::vector<float>(form.n));
}

}  // namespace

int main() {
  int number = 0;
  for_each_zoned([&](const Form& form, int64_t m) {  // every fifth: all forms and fractions, at some of the sizes
    if (++number % 5 == 0) multiplies<float>(form, m, Dtype::f32, 0.0);
  });
  // More rows than share a block, more words than warps have at once, blocks of columns that they share.
  for (const uint32_t salient : {0u, 5u, 14u}) {
    for (const bool split : {false, true}) {
      multiplies<float>({17, 1300, 128, true, false, split, Dtype::f16, salient}, 19, Dtype::f32, 0.0);
      multiplies<BFloat16>({20, 700, 256, true, true, split, Dtype::f16, salient}, 17, Dtype::bf16, 0x1p-8);
      multiplies<BFloat16>({20, 700, 64, false, false, split, Dtype::f32, salient}, 3, Dtype::bf16, 0x1p-8);
      multiplies<Float16>({40, 333, 288, true, true, split, Dtype::f16, salient}, 9, Dtype::f16, 0x1p-10);
      multiplies<Float16>({5, 9000, 32, false, false, split, Dtype::f32, salient}, 1, Dtype::f16, 0x1p-10);
    }
  }
  for (const int64_t k : {33, 70, 600}) {
    stays_inside({19, k, 64, true, false, true, Dtype::f16, 5});
    stays_inside({19, k, 128, true, false, false, Dtype::f16, 5});
  }
  ZonedMatmulParams p;
  p.m = -1;
  CHECK(cuda::launch_zoned_matmul(p, nullptr, nullptr, nullptr) == Status::bad_size);
  p.m = 1;
  p.weight.block = 40;
  CHECK(cuda::launch_zoned_matmul(p, nullptr, nullptr, nullptr) == Status::bad_argument);
  return failures() != 0;
}
