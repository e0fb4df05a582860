// SPDX-License-Identifier: Apache-2.0
// Rounding to int8: each instruction set against the generic form, on odd widths and on values that are not finite.
#include <limits>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "int8.h"

using namespace bitmill;

int main() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t k : {0, 1, 15, 16, 17, 31, 33, 100}) {
    const int64_t m = 5;
    std::vector<float> x(static_cast<size_t>(m * k));
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(static_cast<int>(i * 2654435761u)) * 1e-9f;
    if (k > 0) {
      x[0] = inf;
      x[static_cast<size_t>(2 * k - 1)] = nan;
      for (int64_t i = 2 * k; i < 3 * k; ++i) x[static_cast<size_t>(i)] = 0.0f;
    }
    struct Result {
      std::vector<int8_t> q;
      std::vector<float> scale;
      std::vector<int32_t> total;
    };
    const auto run = [&] {
      Result r{std::vector<int8_t>(x.size()), std::vector<float>(m), std::vector<int32_t>(m)};
      Int8QuantizeParams p;
      p.x = x.data();
      p.m = m;
      p.k = k;
      p.q = r.q.data();
      p.scale = r.scale.data();
      p.total = r.total.data();
      CHECK(int8_quantize(p) == Status::ok);
      return r;
    };
    select(InstructionSet::generic);
    const Result want = run();
    for (int64_t row = 0; row < m; ++row) {
      int32_t total = 0;
      for (int64_t i = row * k; i < (row + 1) * k; ++i) total += want.q[static_cast<size_t>(i)];
      CHECK(total == want.total[static_cast<size_t>(row)]);
    }
    for (const InstructionSet set : kInstructionSets) {
      if (!select(set)) continue;
      const Result got = run();
      CHECK(got.q == want.q && got.total == want.total);
      for (size_t i = 0; i < want.scale.size(); ++i) {
        CHECK(got.scale[i] == want.scale[i] || (got.scale[i] != got.scale[i] && want.scale[i] != want.scale[i]));
      }
    }
    select(best());
  }
  Int8QuantizeParams bad;
  bad.k = -1;
  CHECK(int8_quantize(bad) == Status::bad_size);
  return bitmill_test::failures() != 0;
}
