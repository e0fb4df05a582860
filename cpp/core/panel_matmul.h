// SPDX-License-Identifier: Apache-2.0
// The obvious product of float activations with a packed weight, shared by every weight-only family: decode the 16 rows
// of a tile to a panel of floats, multiply every activation row with it, scale, add the bias, round once.
// A sum runs over the columns first to last, so it does not depend on the number of threads.
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

// decode(tile, begin, end, panel): weights of the tile's 16 rows, columns [begin, end), to panel [end - begin][16].
// finish(row, tile, lane, group, sum, out): adds the group's contribution to `out`, which starts at 0.
// For a tile the groups come first to last; `done(row, tile, lane, out)` makes the result.
template <class T, class Decode, class Finish, class Done>
void panel_matmul(const PanelShape& shape, const T* x, T* out, ParallelFor parallel_for, const Decode& decode,
                  const Finish& finish, const Done& done) {
  constexpr int64_t kChunk = 256;  // columns: a panel of 16 KiB stays in the first-level cache
  const auto tiles = [&](int64_t first, int64_t last) {
    std::vector<float> panel(kChunk * kTileRows), sum(shape.m * kTileRows), result(shape.m * kTileRows);
    for (int64_t tile = first; tile < last; ++tile) {
      std::fill(result.begin(), result.end(), 0.0f);
      const int64_t lanes = std::min(kTileRows, shape.n - tile * kTileRows);
      for (int64_t group = 0; group < shape.groups(); ++group) {
        const int64_t group_end = std::min(shape.k, (group + 1) * shape.group_width());
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t begin = group * shape.group_width(); begin < group_end; begin += kChunk) {
          const int64_t end = std::min(group_end, begin + kChunk);
          decode(tile, begin, end, panel.data());
          for (int64_t row = 0; row < shape.m; ++row) {
            float lane_sum[kTileRows];
            std::copy_n(sum.data() + row * kTileRows, kTileRows, lane_sum);
            const T* activations = x + row * shape.k + begin;
            for (int64_t j = 0; j < end - begin; ++j) {
              const float a = to_float(activations[j]);
              const float* weights = panel.data() + j * kTileRows;
              for (int64_t lane = 0; lane < kTileRows; ++lane) lane_sum[lane] += a * weights[lane];
            }
            std::copy_n(lane_sum, kTileRows, sum.data() + row * kTileRows);
          }
        }
        for (int64_t row = 0; row < shape.m; ++row) {
          for (int64_t lane = 0; lane < lanes; ++lane) {
            finish(row, tile, lane, group, sum[row * kTileRows + lane], result[row * kTileRows + lane]);
          }
        }
      }
      for (int64_t row = 0; row < shape.m; ++row) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          store(done(row, tile, lane, result[row * kTileRows + lane]), out + row * shape.n + tile * kTileRows + lane);
        }
      }
    }
  };
  const double nanoseconds = static_cast<double>(shape.m) * static_cast<double>(shape.k) * kTileRows * 0.3;
  split(parallel_for, tile_count(shape.n), nanoseconds, tiles);
}

}  // namespace bitmill::detail
