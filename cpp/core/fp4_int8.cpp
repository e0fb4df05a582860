// SPDX-License-Identifier: Apache-2.0
// FP4 weights as integers, and the obvious form of their product with int8 activations.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "fp4_matmul.h"
#include "layout.h"

namespace bitmill {

// The unit is the lowest bit that any value has.
bool fp4_integers(const float* table, Fp4Integers& integers) {
  int lowest = 0;
  bool any = false;
  for (int i = 0; i < 16; ++i) {
    if (!std::isfinite(table[i])) return false;
    if (table[i] == 0) continue;
    int exponent;
    const auto mantissa = static_cast<uint32_t>(std::abs(std::frexp(table[i], &exponent)) * 0x1p24f);
    const int bit = exponent - 24 + std::countr_zero(mantissa);
    lowest = any ? std::min(lowest, bit) : bit;
    any = true;
  }
  integers.unit = std::ldexp(1.0f, lowest);
  for (int i = 0; i < 16; ++i) {
    const double value = std::ldexp(static_cast<double>(table[i]), -lowest);
    if (std::abs(value) > 127) return false;
    integers.value[i] = static_cast<int8_t>(value);
  }
  return true;
}

int64_t fp4_int8_columns(const Fp4Integers& integers) {
  int largest = 1;
  for (const int8_t value : integers.value) largest = std::max(largest, std::abs(int{value}));
  return std::numeric_limits<int32_t>::max() / (127 * largest);
}

namespace detail {

void fp4_int8_matmul_tiles_generic(const Fp4MatmulParams& p, const Fp4Integers& integers, int64_t begin, int64_t end) {
  const Fp4Weight& w = p.weight;
  const int64_t words = word_count(w.k, 4), width = w.group_width(), groups = w.groups();
  const auto* x = static_cast<const int8_t*>(p.x);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int32_t* codes = w.tiles + tile * words * kTileRows;
    const int64_t lanes = std::min(kTileRows, w.n - tile * kTileRows);
    for (int64_t row = 0; row < p.m; ++row) {
      float sum[kTileRows] = {};
      for (int64_t group = 0; group < groups; ++group) {
        int32_t dot[kTileRows] = {};
        for (int64_t j = group * width; j < std::min(w.k, (group + 1) * width); ++j) {
          for (int64_t lane = 0; lane < kTileRows; ++lane) {
            const uint32_t code = (static_cast<uint32_t>(codes[(j / 8) * kTileRows + lane]) >> (4 * (j % 8))) & 15u;
            dot[lane] += integers.value[code] * x[row * w.k + j];
          }
        }
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const float scale = weight_scale(w, (tile * kTileRows + lane) * groups + group);
          const auto total = static_cast<float>(dot[lane]);
          sum[lane] += scale * integers.unit * (p.grouped_rows ? p.row_scale[row * groups + group] * total : total);
        }
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t column = tile * kTileRows + lane;
        float value = p.grouped_rows ? sum[lane] : sum[lane] * p.row_scale[row];
        if (p.bias) value += p.bias[column];
        with_dtype(p.dtype, p.out, [&](auto* out) { store(value, out + row * w.n + column); });
      }
    }
  }
}

}  // namespace detail
}  // namespace bitmill
