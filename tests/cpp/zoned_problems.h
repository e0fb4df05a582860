// SPDX-License-Identifier: Apache-2.0
// Zoned weights in every form, written from the description of their layout, beside the dense weight in double.
// Buffers end where the arrays end, so that the sanitizer sees a read past them.
#pragma once

#include <algorithm>
#include <vector>

#include "layout.h"
#include "zoned.h"

namespace bitmill_test {

using namespace bitmill;

inline uint32_t state = 1;
inline uint32_t next() { return state = state * 1664525u + 1013904223u; }
inline float next_float() { return static_cast<float>(static_cast<int>(next())) * 1e-9f; }

struct Form {
  int64_t n, k, block;
  bool centred, columns, split;
  Dtype scale_dtype;
  uint32_t salient;  // of 16 columns so many
};

struct Weight {
  std::vector<int32_t> sign, zone, salient_zone, salient;
  std::vector<float> scale, column_scale;
  std::vector<Float16> half_scale, half_column_scale;
  std::vector<double> dense;  // the reference [n, k]
  ZonedWeight view;
};

inline void set_bit(std::vector<int32_t>& tiles, int64_t words, int64_t row, int64_t column) {
  tiles[((row / kTileRows) * words + column / 32) * kTileRows + row % kTileRows] |=
      static_cast<int32_t>(1u << (column % 32));
}

// Writes the layout from its description in layout.h, block after block, beside the dense weight.
inline Weight make(const Form& f) {
  Weight w;
  const int64_t words = word_count(f.k), blocks = ceil_div(f.k, f.block), tiles = tile_count(f.n);
  w.salient.assign(words, 0);
  std::vector<bool> salient(f.k);
  for (int64_t c = 0; c < f.k; ++c) {
    salient[c] = (next() >> 28) < f.salient;
    if (salient[c]) w.salient[c / 32] |= static_cast<int32_t>(1u << (c % 32));
  }
  ZonedWeight& v = w.view;
  v.n = f.n, v.k = f.k, v.block = f.block, v.centred = f.centred, v.split = f.split, v.scale_dtype = f.scale_dtype;
  w.scale.assign(tiles * blocks * v.scales() * kTileRows, 0.0f);
  w.column_scale.assign(f.columns ? f.k : 0, 1.0f);
  const auto round = [&](std::vector<float>& values, std::vector<Float16>& halves) {
    halves.resize(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = next_float();
      if (f.scale_dtype == Dtype::f32) continue;
      store(values[i], &halves[i]);
      values[i] = to_float(halves[i]);
    }
  };
  round(w.scale, w.half_scale);
  round(w.column_scale, w.half_column_scale);
  w.sign.assign(tiles * words * kTileRows, 0);
  w.zone = w.sign;
  std::vector<std::vector<bool>> split_bits(f.n);
  int64_t width = 0;  // of salient_zone
  w.dense.assign(f.n * f.k, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * f.block, last = std::min(f.k, first + f.block);
    std::vector<int64_t> order;
    for (const bool wanted : {true, false}) {
      for (int64_t c = first; c < last; ++c) {
        if (salient[c] == wanted) order.push_back(c);
      }
    }
    int64_t count = 0;
    while (count < last - first && salient[order[count]]) ++count;
    const int64_t begin = width;
    width += 8 * ceil_div(count, 8);
    for (int64_t row = 0; row < f.n; ++row) {
      std::vector<bool>& bits = split_bits[row];
      bits.resize(width);
      for (int64_t i = 0; i < last - first; ++i) {
        const bool one = next() >> 31, two = next() >> 31, sparse = next() >> 31, is_salient = i < count;
        if (one) set_bit(w.sign, words, row, first + i);
        if (is_salient ? two : sparse) set_bit(w.zone, words, row, first + i);
        if (is_salient) bits[begin + i] = sparse;
        int64_t zone = is_salient ? (f.split && sparse ? 3 : 2) : sparse;
        int64_t at = 0;
        for (int64_t z = 0; z < zone; ++z) at += (f.centred ? 2 : 1) + (z >= 2);
        const auto scale = [&] {
          const int64_t tile_block = (row / kTileRows) * blocks + block;
          return double{w.scale[(tile_block * v.scales() + at++) * kTileRows + row % kTileRows]};
        };
        double value = f.centred ? scale() : 0.0;
        value += (one ? 1 : -1) * scale();
        if (is_salient) value += (two ? 1 : -1) * scale();
        w.dense[row * f.k + order[i]] = value * (f.columns ? w.column_scale[order[i]] : 1.0f);
      }
    }
  }
  w.salient_zone.assign(tiles * word_count(width) * kTileRows, 0);
  for (int64_t row = 0; row < f.n; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      if (split_bits[row][i]) set_bit(w.salient_zone, word_count(width), row, i);
    }
  }
  const bool halves = f.scale_dtype == Dtype::f16;
  v.sign = w.sign.data(), v.zone = w.zone.data(), v.salient = w.salient.data();
  v.salient_zone = w.salient_zone.data(), v.salient_zone_words = word_count(width);
  v.scale = halves ? static_cast<const void*>(w.half_scale.data()) : w.scale.data();
  const void* columns = halves ? static_cast<const void*>(w.half_column_scale.data()) : w.column_scale.data();
  v.column_scale = f.columns ? columns : nullptr;
  return w;
}

// test(form, m) for every form and odd size.
template <class Test>
void for_each_zoned(const Test& test) {
  for (const int64_t k : {0, 1, 31, 33, 128, 200, 300}) {
    for (const int64_t n : {0, 1, 17, 70}) {
      for (const uint32_t salient : {0u, 3u, 16u}) {
        test(Form{n, k, 128, true, false, false, Dtype::f16, salient}, n == 17 ? 7 : 1);
        test(Form{n, k, 32, false, true, false, Dtype::f32, salient}, 1);
        test(Form{n, k, 96, true, false, true, Dtype::f32, salient}, n == 17 ? 5 : 2);
        test(Form{n, k, 64, false, true, true, Dtype::f16, salient}, 4);
      }
    }
  }
}

}  // namespace bitmill_test
