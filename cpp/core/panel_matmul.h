// SPDX-License-Identifier: Apache-2.0
// The obvious product of float activations with a packed weight, shared by every weight-only family: decode
// the 16 rows of a tile to a panel of floats, multiply every activation row with it, scale, add the bias,
// round once. A sum runs over the columns first to last, so it does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "floats.h"
#include "layout.h"
#include "parallel.h"

namespace bitmill::detail {

struct PanelShape {
  int64_t m, n, k;
  int64_t group_size;  // columns that share a scale; 0: all

  int64_t group_width() const { return group_size > 0 ? group_size : std::max<int64_t>(k, 1); }
  int64_t groups() const { return group_size > 0 ? ceil_div(k, group_size) : 1; }
};

// sum[row][lane] += x[row][j] * panel[j][lane] for all columns, in fours: ((x0 p0 + x1 p1) + (x2 p2 + x3 p3))
// is added to the sum, the order in which a table of the sums of 4 columns works. Rows are `stride` elements
// apart.
template <class T>
void multiply_panel(const T* x, int64_t rows, int64_t stride, int64_t columns, const float* panel, float* sum) {
  for (int64_t row = 0; row < rows; ++row) {
    float lane_sum[kTileRows];
    std::copy_n(sum + row * kTileRows, kTileRows, lane_sum);
    const T* a = x + row * stride;
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      const float a0 = to_float(a[j]), a1 = to_float(a[j + 1]), a2 = to_float(a[j + 2]), a3 = to_float(a[j + 3]);
      const float* p = panel + j * kTileRows;
      for (int64_t lane = 0; lane < kTileRows; ++lane) {
        const float left = a0 * p[lane] + a1 * p[lane + kTileRows];
        const float right = a2 * p[lane + 2 * kTileRows] + a3 * p[lane + 3 * kTileRows];
        lane_sum[lane] += left + right;
      }
    }
    for (int64_t lane = 0; j < columns && lane < kTileRows; ++lane) {
      float terms[4] = {-0.0f, -0.0f, -0.0f, -0.0f};  // adding -0 changes nothing
      for (int64_t i = j; i < columns; ++i) terms[i - j] = to_float(a[i]) * panel[i * kTileRows + lane];
      lane_sum[lane] += (terms[0] + terms[1]) + (terms[2] + terms[3]);
    }
    std::copy_n(lane_sum, kTileRows, sum + row * kTileRows);
  }
}

// Tiles [first, last) on this thread. decode(tile, begin, end, panel): weights of the tile's 16 rows, columns [begin,
// end), to panel [end - begin][16]. finish(row, tile, lane, group, sum, out): adds the group's contribution to `out`,
// which starts at 0. For a tile the groups come first to last; `done(row, tile, lane, out)` makes the result.
template <class T, class Decode, class Finish, class Done>
void panel_tiles(const PanelShape& shape, const T* x, T* out, int64_t first, int64_t last, const Decode& decode,
                 const Finish& finish, const Done& done) {
  constexpr int64_t kColumns = 256;  // a panel of 16 KiB stays in the first-level cache
  constexpr int64_t kRows = 256;     // bounds the scratch memory
  const auto multiply_tile = [&](int64_t tile, int64_t row, int64_t rows, float* panel, float* sum, float* result) {
    const int64_t lanes = std::min(kTileRows, shape.n - tile * kTileRows);
    std::fill_n(result, rows * kTileRows, 0.0f);
    for (int64_t group = 0; group < shape.groups(); ++group) {
      const int64_t group_end = std::min(shape.k, (group + 1) * shape.group_width());
      std::fill_n(sum, rows * kTileRows, 0.0f);
      for (int64_t begin = group * shape.group_width(); begin < group_end; begin += kColumns) {
        const int64_t end = std::min(group_end, begin + kColumns);
        decode(tile, begin, end, panel);
        multiply_panel(x + row * shape.k + begin, rows, shape.k, end - begin, panel, sum);
      }
      for (int64_t i = 0; i < rows * kTileRows; ++i) {
        const int64_t lane = i % kTileRows;
        if (lane < lanes) finish(row + i / kTileRows, tile, lane, group, sum[i], result[i]);
      }
    }
    for (int64_t i = 0; i < rows * kTileRows; ++i) {
      const int64_t lane = i % kTileRows, output = (row + i / kTileRows) * shape.n + tile * kTileRows + lane;
      if (lane < lanes) store(done(row + i / kTileRows, tile, lane, result[i]), out + output);
    }
  };
  const int64_t block = std::min(kRows, shape.m);
  std::vector<float> panel(kColumns * kTileRows), sum(block * kTileRows), result(block * kTileRows);
  for (int64_t tile = first; tile < last; ++tile) {
    for (int64_t row = 0; row < shape.m; row += kRows) {
      multiply_tile(tile, row, std::min(kRows, shape.m - row), panel.data(), sum.data(), result.data());
    }
  }
}

// All tiles.
template <class T, class Decode, class Finish, class Done>
void panel_matmul(const PanelShape& shape, const T* x, T* out, ParallelFor parallel_for, const Decode& decode,
                  const Finish& finish, const Done& done) {
  const double nanoseconds = static_cast<double>(shape.m) * static_cast<double>(shape.k) * kTileRows * 0.3;
  split(parallel_for, tile_count(shape.n), nanoseconds,
        [&](int64_t first, int64_t last) { panel_tiles(shape, x, out, first, last, decode, finish, done); });
}

}  // namespace bitmill::detail
