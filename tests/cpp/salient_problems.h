// SPDX-License-Identifier: Apache-2.0
// Partially binarised weights in every encoding, with their dense form in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "layout.h"
#include "salient_scatter.h"

namespace bitmill_test {

using namespace bitmill;

struct Case {
  int64_t n, k, group_size = 0;
  double fraction = 0.1;
  bool codes = true, centred = true;
  SalientEncoding encoding = SalientEncoding::bitmap;
};

struct Weight {
  std::vector<int32_t> sign, mask, start, column, tiles;
  std::vector<uint8_t> code, gap;
  std::vector<Float16> half;
  std::vector<float> value_scale, value_zero, alpha, mu;
  std::vector<double> dense;  // the reference [n, k]
  std::vector<bool> salient;  // [n, k]
  SalientWeight view;
};

// The codes or halves of a bitmap, row by row, as a list or as columns. Vectors are exactly as long as they must be.
inline void encode(const Case& c, Weight& w) {
  SalientWeight& view = w.view;
  const int64_t in_word = c.codes ? 4 : 2;
  view.encoding = c.encoding;
  if (c.encoding == SalientEncoding::bitmap) return;
  view.mask = view.start = nullptr;
  if (c.encoding == SalientEncoding::columns) {
    for (int64_t column = 0; column < c.k; ++column) {
      if (c.n > 0 && w.salient[column]) w.column.push_back(static_cast<int32_t>(column));
    }
    const int64_t count = static_cast<int64_t>(w.column.size()), words = ceil_div(count, in_word);
    w.tiles.assign(tile_count(c.n) * words * kTileRows, 0);
    for (int64_t row = 0, entry = 0; row < c.n; ++row) {
      for (int64_t j = 0; j < count; ++j, ++entry) {
        const uint32_t value = c.codes ? w.code[entry] : w.half[entry].bits;
        const int64_t word = ((row / kTileRows) * words + j / in_word) * kTileRows + row % kTileRows;
        w.tiles[word] |= static_cast<int32_t>(value << (32 / in_word * (j % in_word)));
      }
    }
    view.column = w.column.data();
    view.value = w.tiles.data();
    view.entries = count;
    return;
  }
  std::vector<std::vector<std::pair<uint8_t, int64_t>>> rows(tile_count(c.n) * kTileRows);
  for (int64_t row = 0, entry = 0; row < c.n; ++row) {
    int64_t previous = -1;
    for (int64_t column = 0; column < c.k; ++column) {
      if (!w.salient[row * c.k + column]) continue;
      for (; column - previous - 1 >= kNoEntry; previous += kNoEntry) rows[row].emplace_back(kNoEntry, -1);
      rows[row].emplace_back(static_cast<uint8_t>(column - previous - 1), entry++);
      previous = column;
    }
  }
  const std::vector<uint8_t> code = std::exchange(w.code, {});
  const std::vector<Float16> half = std::exchange(w.half, {});
  w.start.assign(1, 0);
  for (int64_t tile = 0; tile < tile_count(c.n); ++tile) {
    size_t steps = 0;
    for (int64_t lane = 0; lane < kTileRows; ++lane) steps = std::max(steps, rows[tile * kTileRows + lane].size());
    for (size_t step = 0; step < steps; ++step) {
      for (int64_t lane = 0; lane < kTileRows; ++lane) {
        const auto& row = rows[tile * kTileRows + lane];
        const bool entry = step < row.size() && row[step].first != kNoEntry;
        w.gap.push_back(step < row.size() ? row[step].first : kNoEntry);
        w.code.push_back(entry ? code[row[step].second] : uint8_t{0});
        w.half.push_back(entry ? half[row[step].second] : Float16{0});
      }
    }
    w.start.push_back(w.start.back() + static_cast<int32_t>(steps));
  }
  view.gap = w.gap.data();
  view.value = c.codes ? static_cast<const void*>(w.code.data()) : w.half.data();
  view.start = w.start.data();
  view.entries = w.start.back();
}

inline Weight make(const Case& c, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  Weight w;
  const int64_t words = word_count(c.k), groups = c.group_size > 0 ? ceil_div(c.k, c.group_size) : 1;
  w.sign.assign(tile_count(c.n) * words * kTileRows, 0);
  w.mask = w.sign;
  w.start.assign(c.n + 1, 0);
  const bool columns = c.encoding == SalientEncoding::columns;
  std::vector<bool> whole(c.k);
  for (int64_t column = 0; column < c.k; ++column) whole[column] = (uniform(random) + 1) / 2 < c.fraction;
  for (int64_t row = 0; row < c.n; ++row) {
    w.value_scale.push_back(0.01f + std::fabs(uniform(random)) * 0.02f);
    w.value_zero.push_back(std::round(127.0f + 100.0f * uniform(random)));
    for (int64_t group = 0; group < groups; ++group) {
      w.alpha.push_back(std::fabs(uniform(random)));
      w.mu.push_back(uniform(random) * 0.1f);
    }
    for (int64_t column = 0; column < c.k; ++column) {
      const int64_t word = ((row / kTileRows) * words + column / 32) * kTileRows + row % kTileRows;
      const int32_t bit = static_cast<int32_t>(1u << (column % 32));
      w.salient.push_back(columns ? whole[column] : (uniform(random) + 1) / 2 < c.fraction);
      if (w.salient.back()) {
        w.mask[word] |= bit;
        w.code.push_back(static_cast<uint8_t>(random() % 256));
        w.half.emplace_back();
        store(uniform(random) * 3, &w.half.back());
        w.dense.push_back(c.codes ? double(w.value_scale[row]) * (double(w.code.back()) - w.value_zero[row])
                                  : double(to_float(w.half.back())));
      } else {
        const bool plus = random() % 2;
        if (plus) w.sign[word] |= bit;
        const int64_t i = row * groups + (c.group_size > 0 ? column / c.group_size : 0);
        w.dense.push_back((c.centred ? double(w.mu[i]) : 0.0) + (plus ? 1.0 : -1.0) * double(w.alpha[i]));
      }
    }
    w.start[row + 1] = static_cast<int32_t>(w.code.size());
  }
  w.view.sign = w.sign.data();
  w.view.mask = w.mask.data();
  w.view.value = c.codes ? static_cast<const void*>(w.code.data()) : w.half.data();
  w.view.start = w.start.data();
  w.view.value_scale = c.codes ? w.value_scale.data() : nullptr;
  w.view.value_zero = c.codes ? w.value_zero.data() : nullptr;
  w.view.alpha = w.alpha.data();
  w.view.mu = c.centred ? w.mu.data() : nullptr;
  w.view.n = c.n;
  w.view.k = c.k;
  w.view.entries = static_cast<int64_t>(w.code.size());
  w.view.group_size = c.group_size;
  encode(c, w);
  return w;
}

inline const Case kSalientCases[] = {{.n = 1, .k = 1},
                                     {.n = 2, .k = 7, .codes = false},
                                     {.n = 15, .k = 31, .centred = false},
                                     {.n = 16, .k = 32, .group_size = 32},
                                     {.n = 17, .k = 33, .group_size = 32, .codes = false},
                                     {.n = 33, .k = 64, .fraction = 0.0},
                                     {.n = 20, .k = 65, .fraction = 1.1},
                                     {.n = 100, .k = 197, .group_size = 64},
                                     {.n = 5, .k = 768, .group_size = 1024},
                                     {.n = 18, .k = 1100, .fraction = 0.004},
                                     {.n = 0, .k = 40},
                                     {.n = 3, .k = 0},
                                     {.n = 3, .k = 0, .group_size = 32}};

}  // namespace bitmill_test
