// SPDX-License-Identifier: Apache-2.0
// Inputs that the tests of core and of its kernels for GPUs share.
#pragma once

#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "binary_matmul.h"
#include "bitpack.h"
#include "check.h"
#include "floats.h"
#include "layout.h"

namespace bitmill_test {

using bitmill::Operand;

inline std::mt19937 random_bits(2);

inline float random_value() {
  static const float special[] = {0.0f, -0.0f, 1e-40f, -1e-40f, INFINITY, -INFINITY, NAN, 1.0f, -1.0f, 0.5f};
  const uint32_t bits = random_bits();
  if (bits % 7 == 0) return special[(bits >> 8) % 10];
  return static_cast<float>(static_cast<int32_t>(bits)) / 1e9f;
}

template <class T>
std::vector<T> random_rows(int64_t count) {
  std::vector<T> x(count);
  for (T& value : x) bitmill::store(random_value(), &value);
  return x;
}

inline std::vector<float> random_scales(int64_t count) {
  std::vector<float> scale(count);
  for (float& value : scale) value = static_cast<float>(static_cast<int32_t>(random_bits())) / 3e9f;
  return scale;
}

inline std::vector<int8_t> random_levels(int64_t count, Operand operand, bool zeros) {
  std::vector<int8_t> levels(count);
  for (int8_t& level : levels) {
    const uint32_t bits = random_bits();
    level = static_cast<int8_t>(bits & 1 ? 1 : operand == Operand::bool_ ? 0 : -1);
    if (zeros && bits % 5 == 0) level = 0;
  }
  return levels;
}

// Bits of rows [m, k]: 1 where `test` holds.
template <class Test>
std::vector<int32_t> rows_of(const std::vector<int8_t>& levels, int64_t m, int64_t k, const Test& test) {
  std::vector<int32_t> words(m * bitmill::word_count(k));
  for (int64_t i = 0; i < m * k; ++i) {
    if (test(levels[i])) words[i / k * bitmill::word_count(k) + i % k / 32] |= static_cast<int32_t>(1u << (i % k % 32));
  }
  return words;
}

template <class Test>
std::vector<int32_t> tiles_of(const std::vector<int8_t>& levels, int64_t n, int64_t k, const Test& test) {
  std::vector<uint8_t> codes(n * k);
  for (int64_t i = 0; i < n * k; ++i) codes[i] = test(levels[i]);
  std::vector<int32_t> tiles(bitmill::tile_count(n) * bitmill::word_count(k) * bitmill::kTileRows);
  CHECK(bitmill::tile_pack(codes.data(), n, k, 1, tiles.data()) == bitmill::Status::ok);
  return tiles;
}

inline constexpr auto positive = [](int8_t level) { return level > 0; };
inline constexpr auto present = [](int8_t level) { return level != 0; };

// Widths of rows to pack.
inline constexpr int64_t kWidths[] = {0, 1, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 197};

// A product of bits, and what it becomes.
struct Problem {
  int64_t m, n, k;
  Operand operand;
  bool weight_zeros;
  int64_t group_size;
};

template <class Test>
void for_each_product(const Test& test) {
  for (const int64_t k : {0, 1, 31, 32, 33, 64, 65, 100, 197}) {
    for (const auto& [m, n] :
         {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {2, 15}, {3, 16}, {4, 17}, {5, 64}, {9, 100}, {1, 200}}) {
      for (const Operand operand : {Operand::sign, Operand::ternary, Operand::bool_}) {
        test(Problem{m, n, k, operand, false, 0});
        test(Problem{m, n, k, operand, true, 0});
        test(Problem{m, n, k, operand, false, 32});
        test(Problem{m, n, k, operand, false, 64});
      }
    }
  }
  for (const int64_t k : {20, 64, 250, 288, 300}) {  // many rows
    for (const auto& [m, n] : {std::pair<int64_t, int64_t>{48, 181}, {53, 81}, {131, 200}}) {
      for (const Operand operand : {Operand::sign, Operand::ternary, Operand::bool_}) {
        test(Problem{m, n, k, operand, false, 0});
      }
      test(Problem{m, n, k, Operand::sign, false, 96});
      test(Problem{m, n, k, Operand::ternary, true, 0});
    }
  }
}

// Ranges and single dot products of a BitOutput for n outputs of k columns.
inline std::vector<int32_t> random_dots(int64_t count, int64_t k) {
  std::vector<int32_t> dots(count);
  for (int32_t& dot : dots) {
    dot = static_cast<int32_t>(random_bits() % static_cast<uint32_t>(2 * k + 3)) - static_cast<int32_t>(k) - 1;
  }
  return dots;
}

}  // namespace bitmill_test
