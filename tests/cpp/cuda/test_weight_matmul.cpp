// SPDX-License-Identifier: Apache-2.0
// The kernels of floats times bits and times 4-bit codes, against sums in double.
#include <algorithm>

#include "../problems.h"
#include "cuda_runtime.h"
#include "fp4.h"
#include "launchers.h"

using namespace bitmill;
using namespace bitmill_test;

namespace {

// Rows that begin at a multiple of 16 bytes, or not.
template <class T>
struct Activations {
  std::vector<T> values;
  const T* data;
  Activations(int64_t count, bool off) : values(count + (off ? 1 : 0)), data(values.data() + (off ? 1 : 0)) {
    for (T& value : values) store(static_cast<float>(static_cast<int32_t>(random_bits())) / 2e9f, &value);
  }
};

// y[m, n] of x and weights [n, k], scaled by group; within the rounding of k additions and of the result.
template <class T>
void close(const std::vector<T>& y, const T* x, const std::vector<double>& weight, const std::vector<float>& bias,
           int64_t m, int64_t n, int64_t k) {
  const double rounding = sizeof(T) == 4 ? 1e-7 : std::is_same_v<T, BFloat16> ? 4e-3 : 5e-4;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t o = 0; o < n; ++o) {
      double want = bias[o], magnitude = std::fabs(bias[o]);
      for (int64_t c = 0; c < k; ++c) {
        const double term = weight[o * k + c] * to_float(x[i * k + c]);
        want += term;
        magnitude += std::fabs(term);
      }
      const double got = to_float(y[i * n + o]);
      CHECK(std::fabs(got - want) <= 1e-7 * static_cast<double>(k + 2) * magnitude + rounding * std::fabs(want));
    }
  }
}

BinaryWeightMatmulParams product(const void* x, const std::vector<int32_t>& weight, const std::vector<float>& scale,
                                 int64_t m, int64_t n, int64_t k, void* out) {
  BinaryWeightMatmulParams p;
  p.x = x;
  p.weight = weight.data();
  p.scale = scale.data();
  p.m = m;
  p.n = n;
  p.k = k;
  p.out = out;
  return p;
}

template <class T>
void multiplies_bits(Dtype dtype, int64_t m, int64_t n, int64_t k, bool zeros, int64_t group_size, bool off) {
  const std::vector<int8_t> w = random_levels(n * k, Operand::sign, zeros);
  const auto bits = tiles_of(w, n, k, positive), nonzero = tiles_of(w, n, k, present);
  const int64_t groups = group_size > 0 ? ceil_div(k, group_size) : 1, width = group_size > 0 ? group_size : k;
  const std::vector<float> scale = random_scales(n * groups), bias = random_scales(n);
  const Activations<T> x(m * k, off);
  std::vector<T> y(m * n);
  BinaryWeightMatmulParams p = product(x.data, bits, scale, m, n, k, y.data());
  p.dtype = dtype;
  p.weight_nonzero = zeros ? nonzero.data() : nullptr;
  p.group_size = group_size;
  p.bias = bias.data();
  CHECK(cuda::launch_binary_weight_matmul(p, nullptr) == Status::ok);
  std::vector<double> weight(n * k);
  for (int64_t i = 0; i < n * k; ++i) weight[i] = static_cast<double>(scale[i / k * groups + i % k / width]) * w[i];
  close(y, x.data, weight, bias, m, n, k);
}

// Whole numbers with one scale a row: the sum is exact, and rounded when it is multiplied by the scale, and once more.
void scales_integers_once(int64_t m, int64_t n, int64_t k) {
  const std::vector<int8_t> w = random_levels(n * k, Operand::sign, false);
  const auto bits = tiles_of(w, n, k, positive);
  const std::vector<float> scale = random_scales(n), bias = random_scales(n);
  std::vector<float> x(m * k), y(m * n);
  for (float& value : x) value = static_cast<float>(random_bits() % 255) - 127.0f;
  BinaryWeightMatmulParams p = product(x.data(), bits, scale, m, n, k, y.data());
  p.bias = bias.data();
  CHECK(cuda::launch_binary_weight_matmul(p, nullptr) == Status::ok);
  for (int64_t i = 0; i < m * n; ++i) {
    float dot = 0.0f;
    for (int64_t c = 0; c < k; ++c) dot += static_cast<float>(w[i % n * k + c]) * x[i / n * k + c];
    const volatile float scaled = scale[i % n] * dot;
    CHECK(y[i] == scaled + bias[i % n]);
  }
}

// A float32 is multiplied in three parts; infinity has one.
void keeps_infinity() {
  const std::vector<float> x = {1.0f, INFINITY, 3.0f}, scale = {1.0f, 1.0f};
  const auto bits = tiles_of({1, 1, 1, 1, -1, 1}, 2, 3, positive);
  std::vector<float> y(2);
  CHECK(cuda::launch_binary_weight_matmul(product(x.data(), bits, scale, 1, 2, 3, y.data()), nullptr) == Status::ok);
  CHECK(y[0] == INFINITY && y[1] == -INFINITY);
}

enum class Scale { floats, e8m0, e4m3 };

template <class T>
void multiplies_codes(Dtype dtype, int64_t m, int64_t n, int64_t k, int64_t group_size, Scale kind, bool off) {
  std::vector<uint8_t> codes(n * k);
  for (uint8_t& code : codes) code = random_bits() & 15u;
  std::vector<int32_t> tiles(tile_count(n) * word_count(k, 4) * kTileRows);
  CHECK(tile_pack(codes.data(), n, k, 4, tiles.data()) == Status::ok);
  const int64_t groups = group_size > 0 ? ceil_div(k, group_size) : 1;
  const std::vector<float> scale = random_scales(n * groups), bias = random_scales(n), global = {0.3f};
  std::vector<uint8_t> bytes(n * groups);
  for (uint8_t& byte : bytes)
    byte = static_cast<uint8_t>(kind == Scale::e8m0 ? 120 + random_bits() % 8 : random_bits() % 127);
  const Activations<T> x(m * k, off);
  std::vector<T> y(m * n);
  const Fp4Table table = group_size == 32 ? fp4_table(kE2M1) : kNf4;
  Fp4MatmulParams p;
  p.x = x.data;
  p.dtype = dtype;
  p.m = m;
  p.weight.tiles = tiles.data();
  p.weight.n = n;
  p.weight.k = k;
  p.weight.group_size = group_size;
  p.weight.table = table.value;
  p.weight.scale = kind == Scale::floats ? scale.data() : nullptr;
  p.weight.scale_bytes = kind == Scale::floats ? nullptr : bytes.data();
  p.weight.global_scale = kind == Scale::e4m3 ? global.data() : nullptr;
  p.bias = bias.data();
  p.out = y.data();
  std::vector<float> values(n * k);
  CHECK(fp4_weight(p.weight, values.data()) == Status::ok);
  if (!off) p.weight.table = nullptr;
  CHECK(cuda::launch_fp4_matmul(p, off ? nullptr : &table, nullptr) == Status::ok);
  close(y, x.data, std::vector<double>(values.begin(), values.end()), bias, m, n, k);
}

}  // namespace

int main() {
  for (const bool off : {false, true}) {
    emulation::last_to_first = off;
    for (const int64_t m : {1, 5, 9}) {
      for (const int64_t k : {1, 31, 96, 260, 1100}) {
        scales_integers_once(m, 19, k);
        for (const bool zeros : {false, true}) {
          for (const int64_t group_size : {0, 32, 128}) {
            multiplies_bits<float>(Dtype::f32, m, 19, k, zeros, group_size, off);
            multiplies_bits<BFloat16>(Dtype::bf16, m, 16, k, zeros, group_size, off);
            multiplies_bits<Float16>(Dtype::f16, m, 7, k, zeros, group_size, off);
          }
        }
        for (const int64_t group_size : {0, 32, 64}) {
          for (const Scale kind : {Scale::floats, Scale::e8m0, Scale::e4m3}) {
            multiplies_codes<float>(Dtype::f32, m, 19, k, group_size, kind, off);
            multiplies_codes<BFloat16>(Dtype::bf16, m, 16, k, group_size, kind, off);
          }
        }
      }
    }
  }
  keeps_infinity();
  BinaryWeightMatmulParams p;
  p.group_size = 31;
  CHECK(cuda::launch_binary_weight_matmul(p, nullptr) == Status::bad_argument);
  const float addend = 0;
  p.group_size = 0, p.addend = {&addend, 1};
  CHECK(cuda::launch_binary_weight_matmul(p, nullptr) == Status::bad_argument);
  Fp4MatmulParams q;
  CHECK(cuda::launch_fp4_matmul(q, nullptr, nullptr) == Status::bad_argument);  // no table
  return failures() != 0;
}
