// SPDX-License-Identifier: Apache-2.0
// The zoned product and its dense form against a double reference, on every instruction set.
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "threads.h"
#include "zoned.h"
#include "zoned_problems.h"

using namespace bitmill_test;

namespace {

void compare(const Form& f, int64_t m) {
  const Weight w = make(f);
  std::vector<float> dense(f.n * f.k);
  CHECK(zoned_dequantize(w.view, dense.data(), reversed_for) == Status::ok);
  for (size_t i = 0; i < dense.size(); ++i) CHECK(std::abs(dense[i] - w.dense[i]) <= 1e-5);
  std::vector<float> x(m * f.k), bias(f.n), got(m * f.n), first;
  for (float& value : x) value = next_float();
  for (float& value : bias) value = next_float();
  for (const InstructionSet set : kInstructionSets) {
    if (!available(set)) continue;
    CHECK(select(set));
    for (const ParallelFor parallel_for : {ParallelFor{serial_for}, ParallelFor{reversed_for}}) {
      ZonedMatmulParams p;
      p.weight = w.view;
      p.x = x.data(), p.m = m, p.bias = bias.data(), p.out = got.data(), p.parallel_for = parallel_for;
      CHECK(zoned_matmul(p) == Status::ok);
      for (int64_t i = 0; i < m * f.n; ++i) {
        double sum = bias[i % f.n], size = 1.0;
        for (int64_t c = 0; c < f.k; ++c) {
          sum += x[i / f.n * f.k + c] * w.dense[i % f.n * f.k + c];
          size += std::abs(x[i / f.n * f.k + c]) * 15.0;
        }
        CHECK(std::abs(got[i] - sum) <= 1e-6 * size);
      }
    }
  }
  CHECK(select(best()));
}

void test_corrupt() {
  Weight w = make({17, 200, 64, true, false, true, Dtype::f16, 4});
  ZonedMatmulParams p;
  p.weight = w.view;
  ++p.weight.salient_zone_words;
  CHECK(zoned_matmul(p) == Status::corrupt && zoned_dequantize(p.weight, nullptr, serial_for) == Status::corrupt);
  p.weight = w.view;
  p.weight.block = 40;
  CHECK(zoned_matmul(p) == Status::bad_argument);
  p.weight = w.view;
  p.m = -1;
  CHECK(zoned_matmul(p) == Status::bad_size);
}

}  // namespace

int main() {
  for_each_zoned(compare);
  // Blocks wider than a panel, more rows than share one.
  for (const uint32_t salient : {0u, 5u, 14u}) {
    compare({33, 520, 256, true, true, true, Dtype::f16, salient}, 131);
    compare({17, 300, 160, false, false, false, Dtype::f32, salient}, 3);
    compare({17, 300, 288, true, false, false, Dtype::f32, salient}, 1);
  }
  test_corrupt();
  return failures() ? 1 : 0;
}
