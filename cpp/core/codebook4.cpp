// SPDX-License-Identifier: Apache-2.0
#include "codebook4.h"

#include <algorithm>

#include "cpu.h"
#include "layout.h"

namespace bitmill {
namespace {

// A value, roughly.
constexpr double kNanoseconds = 8.0, kVectorNanoseconds = 0.5;

uint32_t magnitude_bits(float x) { return std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu; }

template <class T>
void quantize_rows(const Codebook4QuantizeParams& p, const T* x, const OrderedCodebook& ordered, uint32_t largest,
                   int64_t begin, int64_t end) {
  RandomWords random(p.random);
  const int64_t groups = p.groups(), bytes = ceil_div(p.k, 2);
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * p.width(), last = std::min(p.k, first + p.width());
      uint32_t amax = 0;
      for (int64_t j = first; j < last; ++j) amax = std::max(amax, magnitude_bits(to_float(input[j])));
      const ScaledGroup scaled = codebook4_scaled(amax, largest);
      p.scale[row * groups + group] = scaled.scale;
      const auto code = [&](int64_t column) -> uint32_t {
        if (column >= last || scaled.scale != scaled.scale) return 0;
        const float z = to_float(input[column]) * scaled.inverse;
        return p.stochastic ? stochastic_code(z, ordered, random(row * p.k + column)) : nearest_code(z, ordered);
      };
      for (int64_t j = first; j < last; j += 2) {
        p.packed[row * bytes + j / 2] = static_cast<uint8_t>(code(j) | (code(j + 1) << 4));
      }
    }
  }
}

Status check(int64_t m, int64_t k, int64_t group_size) {
  if (m < 0 || k < 0 || k > kMaxColumns) return Status::bad_size;
  return group_size < 0 || group_size % 8 != 0 ? Status::bad_argument : Status::ok;
}

}  // namespace

Status codebook4_quantize(const Codebook4QuantizeParams& p) {
  if (const Status status = check(p.m, p.k, p.group_size); status != Status::ok) return status;
  OrderedCodebook ordered{};
  uint32_t largest = 0;
  for (int i = 0; i < 16; ++i) {
    place_in_order(p.codebook, i, ordered);
    largest = std::max(largest, magnitude_bits(p.codebook[i]));
  }
  for (int i = 0; i < 15; ++i) place_middle(i, ordered);
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes() && !p.stochastic) {
    split(p.parallel_for, p.m, static_cast<double>(p.k) * kVectorNanoseconds,
          [&](int64_t begin, int64_t end) { detail::codebook4_quantize_rows_avx2(p, ordered, largest, begin, end); });
    return Status::ok;
  }
#endif
  split(p.parallel_for, p.m, static_cast<double>(p.k) * kNanoseconds, [&](int64_t begin, int64_t end) {
    with_dtype(p.dtype, p.x, [&](const auto* x) { quantize_rows(p, x, ordered, largest, begin, end); });
  });
  return Status::ok;
}

Status codebook4_dequantize(const Codebook4DequantizeParams& p) {
  if (const Status status = check(p.m, p.k, p.group_size); status != Status::ok) return status;
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) {
    split(p.parallel_for, p.m, static_cast<double>(p.k) * kVectorNanoseconds,
          [&](int64_t begin, int64_t end) { detail::codebook4_dequantize_rows_avx2(p, begin, end); });
    return Status::ok;
  }
#endif
  const int64_t groups = p.group_size > 0 ? ceil_div(p.k, p.group_size) : 1;
  const int64_t width = p.group_size > 0 ? p.group_size : std::max<int64_t>(p.k, 1);
  split(p.parallel_for, p.m, static_cast<double>(p.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* codes = p.packed + row * ceil_div(p.k, 2);
      for (int64_t j = 0; j < p.k; ++j) {
        const float value = p.codebook[(codes[j / 2] >> (4 * (j % 2))) & 15];
        p.values[row * p.k + j] = value * p.scale[row * groups + j / width];
      }
    }
  });
  return Status::ok;
}

}  // namespace bitmill
