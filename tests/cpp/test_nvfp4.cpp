// SPDX-License-Identifier: Apache-2.0
// NVFP4 blocks: every instruction set that this machine has against the generic form, bit for bit. Buffers end where
// the arrays end, so that the sanitizer sees an access past them.
#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "layout.h"
#include "nvfp4.h"

using namespace bitmill;

namespace {

void compare(int64_t m, int64_t k, const float* global_scale, Rounding rounding) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> x(m * (k + 1));  // rows have a gap
  for (float& value : x) value = std::ldexp(normal(random), static_cast<int>(random() % 40) - 20);
  for (const float special : {HUGE_VALF, -HUGE_VALF, NAN, 3.4e38f, 1e-45f, -0.0f}) {
    if (!x.empty()) x[random() % x.size()] = special;
  }
  const auto quantize = [&](InstructionSet set, int64_t row_stride) {
    std::vector<uint8_t> bytes(m * (ceil_div(k, 2) + ceil_div(k, kNvBlock)));
    Nvfp4QuantizeParams p{.x = x.data(), .m = m, .k = k, .row_stride = row_stride, .global_scale = global_scale};
    p.rounding = rounding;
    p.packed = bytes.data();
    p.scale = bytes.data() + m * ceil_div(k, 2);
    CHECK(select(set) && nvfp4_quantize(p) == Status::ok);
    return bytes;
  };
  const auto dequantize = [&](InstructionSet set, const std::vector<uint8_t>& bytes) {
    std::vector<float> values(m * k);
    Nvfp4DequantizeParams p{.packed = bytes.data(), .scale = bytes.data() + m * ceil_div(k, 2), .m = m, .k = k};
    p.global_scale = global_scale, p.values = values.data();
    CHECK(select(set) && nvfp4_dequantize(p) == Status::ok);
    std::vector<uint32_t> bits(values.size());
    for (size_t i = 0; i < values.size(); ++i) bits[i] = std::bit_cast<uint32_t>(values[i]);
    return bits;
  };
  for (const int64_t row_stride : {k, k + 1}) {
    const std::vector<uint8_t> want = quantize(InstructionSet::generic, row_stride);
    for (const InstructionSet set : kInstructionSets) {
      if (!available(set)) continue;
      CHECK(quantize(set, row_stride) == want);
      CHECK(dequantize(set, want) == dequantize(InstructionSet::generic, want));
    }
  }
  select(best());
}

}  // namespace

int main() {
  const float numbers[] = {0.01f, 1.0f / 3.0f, 1e30f, 1e-37f, 1e-40f, 0.0f, -1.0f, HUGE_VALF, NAN};
  for (const int64_t k : {0, 1, 15, 16, 33, 128, 150, 272}) {
    for (const Rounding rounding : {Rounding::nearest_even, Rounding::toward_zero, Rounding::half_away}) {
      compare(9, k, nullptr, rounding);
      for (const float& number : numbers) compare(9, k, &number, rounding);
    }
    compare(3, k, numbers, Rounding::stochastic);
  }
  return bitmill_test::failures() != 0;
}
