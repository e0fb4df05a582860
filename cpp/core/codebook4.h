// SPDX-License-Identifier: Apache-2.0
// 4-bit codes of any 16 values, with a float scale for a group of columns (bitsandbytes' NF4 and FP4):
//   scale = fl(amax / max |table|),  z = fl(x min(fl(1 / scale), the largest float)),  code = that of the value nearest
//   to z, the lower one up to the middle fl((a + b) / 2) of neighbours a < b
// or, stochastic, of b where floor(2^32 (z - a) / (b - a)) + random >= 2^32, in double, and beyond the table its end.
// Of equal values the lowest code stands for all. Packed rows are those of fp4.h.
#pragma once

#include "fp4.h"

namespace bitmill {

struct Codebook4QuantizeParams {
  const void* x = nullptr;  // [m, k], rows `row_stride` elements apart
  Dtype dtype = Dtype::f32;
  int64_t m = 0, k = 0, row_stride = 0;
  const float* codebook = nullptr;  // [16], the value of each code
  int64_t group_size = 0;           // columns that share a scale, a multiple of 8; 0: one group
  bool stochastic = false;
  RandomStream random = {};   // element i, j is i * k + j
  uint8_t* packed = nullptr;  // [m, ceil(k / 2)]
  float* scale = nullptr;     // [m, groups]
  ParallelFor parallel_for = serial_for;

  int64_t groups() const { return group_size > 0 ? ceil_div(k, group_size) : 1; }
  int64_t width() const { return group_size > 0 ? group_size : k; }
};
// A group with a NaN or an infinity has scale NaN and codes 0; so have all for a table with one, or with zeros alone.
Status codebook4_quantize(const Codebook4QuantizeParams& params);

struct Codebook4DequantizeParams {
  const uint8_t* packed = nullptr;  // [m, ceil(k / 2)]
  const float* scale = nullptr;     // [m, groups]
  const float* codebook = nullptr;  // [16]
  int64_t m = 0, k = 0, group_size = 0;
  float* values = nullptr;  // [m, k]
  ParallelFor parallel_for = serial_for;
};
Status codebook4_dequantize(const Codebook4DequantizeParams& params);

struct OrderedCodebook;
namespace detail {
// Rows [begin, end), not stochastic. `largest`: the bits of the largest magnitude of the table.
void codebook4_quantize_rows_avx2(const Codebook4QuantizeParams& params, const OrderedCodebook& ordered,
                                  uint32_t largest, int64_t begin, int64_t end);
void codebook4_dequantize_rows_avx2(const Codebook4DequantizeParams& params, int64_t begin, int64_t end);
}  // namespace detail

// A table in ascending order, with the code that stands for each place.
struct OrderedCodebook {
  float value[16], middle[15];
  uint8_t code[16];
};

// Puts value i where it belongs. A table with a NaN has no order, and no use; 0 stands for it here.
static constexpr void place_in_order(const float* table, int i, OrderedCodebook& ordered) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  const auto number = [&](int j) {
    const float value = table[j];
    return value != value ? 0.0f : value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
  };
  int place = 0, lowest = i;
  for (int j = 15; j >= 0; --j) {
    if (number(j) < number(i) || (number(j) == number(i) && j < i)) ++place;
    if (number(j) == number(i)) lowest = j;
  }
  ordered.value[place] = number(i);
  ordered.code[place] = static_cast<uint8_t>(lowest);
}
// Of places i and i + 1.
static constexpr void place_middle(int i, OrderedCodebook& ordered) {
  ordered.middle[i] = (ordered.value[i + 1] + ordered.value[i]) / 2;
}

struct ScaledGroup {
  float scale, inverse;
};
// Of the bits of the largest magnitudes of a group and of the table.
static constexpr ScaledGroup codebook4_scaled(uint32_t amax, uint32_t largest) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float scale = std::bit_cast<float>(amax) / std::bit_cast<float>(largest), inverse = 1.0f / scale;
  if (!(scale < kInfinity) || largest >= 0x7F800000u) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  return {scale, inverse < std::numeric_limits<float>::max() ? inverse : std::numeric_limits<float>::max()};
}

static constexpr uint32_t nearest_code(float z, const OrderedCodebook& ordered) {
  uint32_t place = 0;
  for (const float middle : ordered.middle) place += middle < z ? 1u : 0u;
  return ordered.code[place];
}

static constexpr uint32_t stochastic_code(float z, const OrderedCodebook& ordered, uint32_t random) {
  uint32_t lower = 0;  // of the places 0 ... 14
  for (int i = 1; i < 15; ++i) lower += ordered.value[i] <= z ? 1u : 0u;
  const double a = ordered.value[lower], b = ordered.value[lower + 1], share = (z - a) / (b - a);
  const double chance = share > 0 ? (share < 1 ? share : 1.0) : 0.0;
  const uint64_t sum = static_cast<uint64_t>(chance * 0x1p32) + random;
  return ordered.code[lower + static_cast<uint32_t>(sum >> 32)];
}

}  // namespace bitmill
