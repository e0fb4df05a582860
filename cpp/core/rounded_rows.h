// SPDX-License-Identifier: Apache-2.0
// Products of rows that are rounded to int8 first, each thread its own ones where rows are divided.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

struct RoundedRows {
  int64_t m, n, k;
  int64_t scales;      // of a row
  double cost;         // of a row and a tile, in nanoseconds
  int64_t least_rows;  // of a block (split_blocks)
};

// round(row, rows, q, scale, parallel_for): rows to q int8 [rows, k] and scale [rows, scales].
// multiply(row, rows, q, scale, first tile, last tile): their product, on this thread.
template <class Round, class Multiply>
void multiply_rounded(const RoundedRows& p, ParallelFor parallel_for, const Round& round, const Multiply& multiply) {
  constexpr int64_t kRows = 256;                 // are still near when they are multiplied
  const bool divided = p.m >= 2 * p.least_rows;  // or one block, whose parts are tiles: rounded once for all of them
  const Scratch<int8_t> all(divided ? 0 : p.m * p.k);
  const Scratch<float> all_scales(divided ? 0 : p.m * p.scales);
  if (!divided) round(0, p.m, all.get(), all_scales.get(), parallel_for);
  const auto run = [&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
    if (!divided) return multiply(row, rows, all.get(), all_scales.get(), begin, end);
    const Scratch<int8_t> q(std::min(rows, kRows) * p.k);
    const Scratch<float> scale(std::min(rows, kRows) * p.scales);
    for (const int64_t last = row + rows; row < last; row += kRows) {
      const int64_t count = std::min(kRows, last - row);
      round(row, count, q.get(), scale.get(), serial_for);
      multiply(row, count, q.get(), scale.get(), begin, end);
    }
  };
  split_blocks(parallel_for, p.m, p.n, p.cost, run, p.least_rows);
}

}  // namespace
}  // namespace bitmill::detail
