// SPDX-License-Identifier: Apache-2.0
// Every float16 and bfloat16 through float and back; rounding of floats against arithmetic; the instruction sets.
#include <bit>
#include <cmath>
#include <cstring>

#include "check.h"
#include "cpu.h"
#include "floats.h"

using namespace bitmill;

namespace {

template <class T>
uint16_t rounded(float x) {
  T out;
  store(x, &out);
  return out.bits;
}

template <class T>
void every_pattern_survives() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = to_float(T{static_cast<uint16_t>(bits)});
    CHECK(std::isnan(x) ? std::isnan(to_float(T{rounded<T>(x)})) : rounded<T>(x) == bits);
  }
}

// Between neighbours a < b: what lies below the middle goes to a, above it to b, the middle itself to the even one.
template <class T>
void rounds_to_nearest_even(uint32_t largest) {
  for (uint32_t bits = 0; bits < largest; ++bits) {
    const float a = to_float(T{static_cast<uint16_t>(bits)}), b = to_float(T{static_cast<uint16_t>(bits + 1)});
    const float middle = static_cast<float>((static_cast<double>(a) + static_cast<double>(b)) / 2);
    const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    CHECK(rounded<T>(middle) == even);
    CHECK(rounded<T>(std::nextafter(middle, a)) == bits);
    CHECK(rounded<T>(std::nextafter(middle, b)) == bits + 1);
    CHECK(rounded<T>(-middle) == (even | 0x8000u));
  }
}

}  // namespace

int main() {
  every_pattern_survives<Float16>();
  every_pattern_survives<BFloat16>();
  rounds_to_nearest_even<Float16>(0x7BFF);
  rounds_to_nearest_even<BFloat16>(0x7F7F);
  CHECK(rounded<Float16>(65519.996f) == 0x7BFF && rounded<Float16>(65520.0f) == 0x7C00);
  CHECK(rounded<Float16>(INFINITY) == 0x7C00 && rounded<BFloat16>(-INFINITY) == 0xFF80);
  CHECK(rounded<BFloat16>(3.4e38f) == 0x7F80);

  const InstructionSet chosen = selected();
  CHECK(chosen == best() && available(chosen) && available(InstructionSet::generic));
  for (const InstructionSet set : kInstructionSets) {
    CHECK(select(set) == available(set));
    CHECK(!available(set) || selected() == set);
    CHECK(std::strlen(name(set)) > 0);
  }
  select(chosen);
  return bitmill_test::failures() != 0;
}
