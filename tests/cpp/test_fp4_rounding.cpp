// SPDX-License-Identifier: Apache-2.0
// The roundings of the casts against their definitions in double, and the random numbers against published ones, on
// every instruction set of this machine.
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "fp4_definition.h"
#include "layout.h"
#include "threads.h"

namespace {

using namespace bitmill;
using bitmill_test::defined_codes;
using bitmill_test::kFormats;
using bitmill_test::kRoundings;
using bitmill_test::NamedFormat;
using bitmill_test::reversed_for;

// Known answers of the Random123 distribution (kat_vectors).
void test_philox() {
  struct Known {
    uint64_t block;
    RandomStream stream;
    uint32_t word[4];
  };
  const uint64_t ones = ~uint64_t{0};
  const Known known[] = {
      {0, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {ones, {ones, ones}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x85a308d3243f6a88, {0x299f31d0a4093822, 0x0370734413198a2e}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Known& k : known) {
    const PhiloxBlock block = philox(k.block, k.stream);
    for (int i = 0; i < 4; ++i) CHECK(block.word[i] == k.word[i]);
  }
  RandomWords words({7, 9});
  for (const uint64_t element : {0, 1, 6, 3, 2, 41, 40})
    CHECK(words(element) == philox(element / 4, {7, 9}).word[element % 4]);
}

// Every bfloat16 and float16, as rows of odd width with a gap between them, cast in parts.
void test_casts() {
  constexpr int64_t k = 257, stride = 258, m = 256, bytes = 129;
  const RandomStream stream{0x123456789abcdef0, 3};
  std::vector<uint16_t> x(m * stride);
  for (int64_t i = 0; i < m * stride; ++i) x[static_cast<size_t>(i)] = static_cast<uint16_t>(i);
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    for (const NamedFormat& named : kFormats) {
      for (const Rounding rounding : kRoundings) {
        std::vector<uint8_t> packed(m * bytes);
        Fp4CastParams p{.x = x.data(), .dtype = dtype, .m = m, .k = k, .row_stride = stride, .format = named.format};
        p.rounding = rounding;
        p.random = stream;
        p.packed = packed.data();
        p.parallel_for = reversed_for;
        CHECK(fp4_cast(p) == Status::ok);
        RandomWords random(stream);
        int wrong = 0;
        for (int64_t i = 0; i < m * k; ++i) {
          const int64_t row = i / k, column = i % k;
          const uint16_t bits = x[static_cast<size_t>(row * stride + column)];
          const float value = dtype == Dtype::bf16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
          const uint32_t word = random(static_cast<uint64_t>(i));
          const int code = (packed[static_cast<size_t>(row * bytes + column / 2)] >> (4 * (column % 2))) & 15;
          wrong += code != defined_codes(named, value, word)[rounding];
        }
        CHECK(wrong == 0);
      }
    }
  }
}

// +-64 ulp around every value and every middle.
void test_neighbours() {
  for (const NamedFormat& named : kFormats) {
    std::vector<float> x;
    for (int i = 0; i < 8; ++i) {
      for (const double point : {named.values[i], (named.values[i] + named.values[i < 7 ? i + 1 : i]) / 2}) {
        const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(point));
        for (uint32_t ulp = bits < 64 ? bits : bits - 64; ulp <= bits + 64; ++ulp) {
          x.push_back(std::bit_cast<float>(ulp));
          x.push_back(-std::bit_cast<float>(ulp));
        }
      }
    }
    for (const float special : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(),
                                std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min()}) {
      x.push_back(special);
      x.push_back(-special);
    }
    for (const Rounding rounding : kRoundings) {
      std::vector<uint8_t> packed(x.size() / 2);
      Fp4CastParams p{.x = x.data(), .m = 1, .k = std::ssize(x), .row_stride = std::ssize(x), .format = named.format};
      p.rounding = rounding;
      p.packed = packed.data();
      CHECK(fp4_cast(p) == Status::ok);
      RandomWords random({});
      for (size_t i = 0; i < x.size(); ++i) {
        CHECK(((packed[i / 2] >> (4 * (i % 2))) & 15) == defined_codes(named, x[i], random(i))[rounding]);
      }
    }
  }
}

// Codes of a block are the casts of its values divided by its scale; a random number belongs to an element of x.
void test_mxfp4() {
  constexpr int64_t m = 8, k = 77, blocks = 3, bytes = 39;
  std::vector<float> x(m * k);
  for (int64_t i = 0; i < m * k; ++i) x[static_cast<size_t>(i)] = std::ldexp(std::sin(static_cast<float>(i)), i % 7);
  const RandomStream stream{5, 0xfedcba9876543210};
  for (const Rounding rounding : kRoundings) {
    std::vector<uint8_t> packed(m * bytes), scale(m * blocks);
    Mxfp4QuantizeParams p{.x = x.data(), .m = m, .k = k, .row_stride = k, .rule = ScaleRule::rceil};
    p.rounding = rounding;
    p.random = stream;
    p.packed = packed.data();
    p.scale = scale.data();
    p.parallel_for = reversed_for;
    CHECK(mxfp4_quantize(p) == Status::ok);
    for (int64_t i = 0; i < m * k; ++i) {
      const int64_t row = i / k, column = i % k;
      const int code = (packed[static_cast<size_t>(row * bytes + column / 2)] >> (4 * (column % 2))) & 15;
      const float unit = e8m0_to_float(scale[static_cast<size_t>(row * blocks + column / 32)]);
      const uint32_t word = RandomWords(stream)(static_cast<uint64_t>(i));
      CHECK(code == defined_codes(kFormats[0], x[static_cast<size_t>(i)] / unit, word)[rounding]);
    }
  }
}

}  // namespace

int main() {
  test_philox();
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    test_casts();
    test_neighbours();
    test_mxfp4();
  }
  return bitmill_test::failures() != 0;
}
