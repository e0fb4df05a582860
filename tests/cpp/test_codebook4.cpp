// SPDX-License-Identifier: Apache-2.0
// Codes of 16 values: every instruction set that this machine has against the generic form, bit for bit. Buffers end
// where the arrays end, so that the sanitizer sees an access past them.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "codebook4.h"
#include "cpu.h"
#include "layout.h"

using namespace bitmill;

namespace {

struct Result {
  std::vector<uint8_t> packed;
  std::vector<float> scale, values;

  bool operator==(const Result& other) const {  // NaN equals NaN
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return packed == other.packed && same(scale, other.scale) && same(values, other.values);
  }
};

template <class T>
void compare(Dtype dtype, int64_t m, int64_t k, int64_t group_size, const std::vector<float>& codebook,
             bool stochastic) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<T> x(m * (k + 1));  // rows have a gap
  for (T& value : x) store(std::ldexp(normal(random), static_cast<int>(random() % 20) - 10), &value);
  for (const float special : {HUGE_VALF, NAN, -0.0f, 1e-45f}) {
    if (!x.empty()) store(special, &x[random() % x.size()]);
  }
  const auto run = [&](InstructionSet set, int64_t row_stride) {
    CHECK(select(set));
    Codebook4QuantizeParams p{.x = x.data(), .dtype = dtype, .m = m, .k = k, .row_stride = row_stride};
    p.codebook = codebook.data(), p.group_size = group_size, p.stochastic = stochastic;
    Result result{std::vector<uint8_t>(m * ceil_div(k, 2)), std::vector<float>(m * p.groups()),
                  std::vector<float>(m * k)};
    p.packed = result.packed.data(), p.scale = result.scale.data();
    CHECK(codebook4_quantize(p) == Status::ok);
    const Codebook4DequantizeParams back{.packed = p.packed,
                                         .scale = p.scale,
                                         .codebook = p.codebook,
                                         .m = m,
                                         .k = k,
                                         .group_size = group_size,
                                         .values = result.values.data()};
    CHECK(codebook4_dequantize(back) == Status::ok);
    return result;
  };
  for (const int64_t row_stride : {k, k + 1}) {
    const Result want = run(InstructionSet::generic, row_stride);
    for (const InstructionSet set : kInstructionSets) {
      if (available(set)) CHECK(run(set, row_stride) == want);
    }
  }
  select(best());
}

}  // namespace

int main() {
  std::vector<float> even(16), halves(16), ties(16), zeros(16), lost(16);
  for (int i = 0; i < 16; ++i) {
    even[i] = static_cast<float>(i) / 7.5f - 1.0f;            // in order
    halves[i] = std::ldexp(i % 2 ? -1.0f : 1.0f, i / 2 - 6);  // not in order
    ties[i] = static_cast<float>(i / 4) - 1.0f;               // values that codes share
    lost[i] = i == 3 ? std::numeric_limits<float>::quiet_NaN() : even[i];
  }
  for (const auto& codebook : {even, halves, ties, zeros, lost}) {
    for (const int64_t k : {0, 1, 8, 31, 64, 130}) {
      for (const int64_t group_size : {0, 8, 64}) {
        for (const bool stochastic : {false, true}) {
          compare<float>(Dtype::f32, 5, k, group_size, codebook, stochastic);
          compare<BFloat16>(Dtype::bf16, 5, k, group_size, codebook, stochastic);
          compare<Float16>(Dtype::f16, 5, k, group_size, codebook, stochastic);
        }
      }
    }
  }
  return bitmill_test::failures() != 0;
}
