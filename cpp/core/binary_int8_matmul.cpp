// SPDX-License-Identifier: Apache-2.0
// The obvious form of the product of int8 activations with bits, and the choice of the instruction set.
#include "binary_int8_matmul.h"

#include <algorithm>
#include <vector>

#include "cpu.h"
#include "layout.h"
#include "rounded_rows.h"
#include "zero_weights.h"

namespace bitmill {
namespace detail {

void binary_int8_matmul_tiles_generic(const BinaryInt8MatmulParams& p, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  const int64_t width = p.group_size > 0 ? p.group_size : std::max<int64_t>(p.k, 1);
  const int64_t groups = ceil_div(p.k, width);
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t column = begin * kTileRows; column < std::min(p.n, end * kTileRows); ++column) {
      const int64_t tile = (column / kTileRows) * words * kTileRows + column % kTileRows;
      const auto bit = [&](const int32_t* tiles, int64_t i) {
        return (static_cast<uint32_t>(tiles[tile + (i / 32) * kTileRows]) >> (i % 32)) & 1u;
      };
      float value = 0.0f;
      for (int64_t group = 0; group < groups; ++group) {
        int32_t dot = 0;
        for (int64_t i = group * width; i < std::min(p.k, (group + 1) * width); ++i) {
          if (p.weight_nonzero && !bit(p.weight_nonzero, i)) continue;
          dot += bit(p.weight, i) ? p.q[row * p.k + i] : -p.q[row * p.k + i];
        }
        const float term = p.scale[column * groups + group] * p.row_scale[row] * static_cast<float>(dot);
        value = group == 0 ? term : value + term;
      }
      if (p.addend) value += p.addend.at(row, column / kTileRows)[column % kTileRows];
      if (p.bias) value += p.bias[column];
      with_dtype(p.out_dtype, p.out, [&](auto* out) { store(value, out + row * p.n + column); });
    }
  }
}

namespace {

constexpr int64_t kRowsOfTables = 4;  // from so many rows on, tables of sums win

struct Kernel {
  void (*tiles)(const BinaryInt8MatmulParams&, int64_t, int64_t);
  double nanoseconds_per_word;     // of one row and one output
  int64_t least_rows = kManyRows;  // of a part: so many share what is made of the weight
};

Kernel choose_kernel([[maybe_unused]] const BinaryInt8MatmulParams& p) {
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes() && p.k > 0) return {binary_int8_matmul_tiles_avx2, 0.2};
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512 && p.k > 0) {
    if (p.m < kRowsOfTables && has_int8_dot()) return {binary_int8_matmul_tiles_avx512vnni, 0.2};
    return {binary_int8_matmul_tiles_avx512, 0.1, kRowUnit};
  }
#endif
  return {binary_int8_matmul_tiles_generic, 30.0};
}

// Tiles with zeros, one group: from two products to floats that are the integers.
void multiply_twice(const BinaryInt8MatmulParams& p, const Kernel& kernel, int64_t begin, int64_t end) {
  const int64_t count = end - begin, column = begin * kTileRows;
  const TwoWeights weights(p.weight, p.weight_nonzero, p.k, begin, count);
  BinaryInt8MatmulParams part;
  part.n = std::min(count * kTileRows, p.n - column);
  part.k = p.k;
  const int64_t most = std::min(p.m, kZeroRows);
  const std::vector<float> ones(static_cast<size_t>(std::max(most, count * kTileRows)), 1.0f);
  part.scale = part.row_scale = ones.data();
  std::vector<float> first(static_cast<size_t>(most * part.n)), second(first.size());
  for (int64_t row = 0; row < p.m; row += kZeroRows) {
    part.m = std::min(kZeroRows, p.m - row);
    part.q = p.q + row * p.k;
    part.weight = weights.lower.data(), part.out = first.data();
    kernel.tiles(part, 0, count);
    part.weight = weights.upper.data(), part.out = second.data();
    kernel.tiles(part, 0, count);
    with_dtype(p.out_dtype, p.out, [&](auto* out) {
      for (int64_t i = 0; i < part.m * part.n; ++i) {
        const int64_t r = row + i / part.n, lane = i % part.n;
        float value = p.scale[column + lane] * p.row_scale[r] * (0.5f * (first[i] + second[i]));
        if (p.addend) value += p.addend.at(r, begin + lane / kTileRows)[lane % kTileRows];
        if (p.bias) value += p.bias[column + lane];
        store(value, out + r * p.n + column + lane);
      }
    });
  }
}

void multiply_tiles(const BinaryInt8MatmulParams& p, const Kernel& kernel, int64_t begin, int64_t end) {
  // half of the largest sum that floats hold, since two are added
  const bool exact = (p.group_size == 0 || p.group_size >= p.k) && p.k <= (1 << 23) / 128;
  BinaryInt8MatmulParams whole = p;
  whole.weight_nonzero = nullptr;
  for_zero_weights(
      p.weight_nonzero, p.n, p.k, begin, end, [&](int64_t first, int64_t last) { kernel.tiles(whole, first, last); },
      [&](int64_t first, int64_t last) {
        exact ? multiply_twice(p, kernel, first, last) : binary_int8_matmul_tiles_generic(p, first, last);
      });
}

}  // namespace

void binary_int8_matmul_tiles(const BinaryInt8MatmulParams& p, int64_t begin, int64_t end) {
  multiply_tiles(p, choose_kernel(p), begin, end);
}

}  // namespace detail

namespace {

Status check(const BinaryInt8MatmulParams& p) {
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  return p.group_size < 0 || p.group_size % 32 != 0 ? Status::bad_argument : Status::ok;
}

// `count` rows of a product, from `row` on.
BinaryInt8MatmulParams rows_of(BinaryInt8MatmulParams p, int64_t row, int64_t count) {
  p.m = count;
  if (p.q) p.q += row * p.k;
  if (p.row_scale) p.row_scale += row;
  p.addend = p.addend.from(row);
  p.out = static_cast<char*>(p.out) + row * p.n * bytes_of(p.out_dtype);
  return p;
}

// Of a row of a tile.
double cost_of(const BinaryInt8MatmulParams& p, const detail::Kernel& kernel) {
  return static_cast<double>((word_count(p.k) + 2) * kTileRows) * kernel.nanoseconds_per_word;
}

}  // namespace

Status binary_int8_matmul(const BinaryInt8MatmulParams& p) {
  if (const Status status = check(p); status != Status::ok) return status;
  const detail::Kernel kernel = detail::choose_kernel(p);
  const auto run = [&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
    detail::multiply_tiles(rows_of(p, row, rows), kernel, begin, end);
  };
  split_blocks(p.parallel_for, p.m, p.n, cost_of(p, kernel), run, kernel.least_rows);
  return Status::ok;
}

Status binary_int8_linear(const Int8QuantizeParams& quantize, const BinaryInt8MatmulParams& p) {
  if (const Status status = check(p); status != Status::ok) return status;
  const detail::Kernel kernel = detail::choose_kernel(p);
  detail::multiply_rounded(
      {p.m, p.n, p.k, 1, cost_of(p, kernel), kernel.least_rows}, p.parallel_for,
      [&](int64_t row, int64_t count, int8_t* q, float* scale, ParallelFor parallel_for) {
        int8_quantize(rounded_to(quantize, row, count, q, scale, parallel_for));
      },
      [&](int64_t row, int64_t count, const int8_t* q, const float* scale, int64_t begin, int64_t end) {
        BinaryInt8MatmulParams part = rows_of(p, row, count);
        part.q = q, part.row_scale = scale;
        detail::multiply_tiles(part, kernel, begin, end);
      });
  return Status::ok;
}

}  // namespace bitmill
