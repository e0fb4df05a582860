// SPDX-License-Identifier: Apache-2.0
// The zoned product and its dense form against a double reference, on every instruction set. Buffers end where the
// arrays end, so that the sanitizer sees a read past them.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "layout.h"
#include "zoned.h"

using namespace bitmill;

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u; }
float next_float() { return static_cast<float>(static_cast<int>(next())) * 1e-9f; }

// Parts of two, in reverse: what any number of threads may do to the order.
void reversed_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  if (middle < end) body(context, middle, end);
  if (begin < middle) body(context, begin, middle);
}

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

void set_bit(std::vector<int32_t>& tiles, int64_t words, int64_t row, int64_t column) {
  tiles[((row / kTileRows) * words + column / 32) * kTileRows + row % kTileRows] |=
      static_cast<int32_t>(1u << (column % 32));
}

// Writes the layout from its description in layout.h, block after block, beside the dense weight.
Weight make(const Form& f) {
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

void compare(const Form& f, int64_t m) {
  const Weight w = make(f);
  std::vector<float> dense(f.n * f.k);
  CHECK(zoned_dequantize(w.view, dense.data(), reversed_for) == Status::ok);
  for (size_t i = 0; i < dense.size(); ++i) CHECK(std::abs(dense[i] - w.dense[i]) <= 1e-5);
  std::vector<float> x(m * f.k), bias(f.n), got(m * f.n), first;
  for (float& value : x) value = next_float();
  for (float& value : bias) value = next_float();
  for (const InstructionSet set : kInstructionSets) {
    if (!available(set)) continue;
    CHECK(select(set));
    for (const ParallelFor parallel_for : {ParallelFor{serial_for}, ParallelFor{reversed_for}}) {
      ZonedMatmulParams p;
      p.weight = w.view;
      p.x = x.data(), p.m = m, p.bias = bias.data(), p.out = got.data(), p.parallel_for = parallel_for;
      CHECK(zoned_matmul(p) == Status::ok);
      for (int64_t i = 0; i < m * f.n; ++i) {
        double sum = bias[i % f.n], size = 1.0;
        for (int64_t c = 0; c < f.k; ++c) {
          sum += x[i / f.n * f.k + c] * w.dense[i % f.n * f.k + c];
          size += std::abs(x[i / f.n * f.k + c]) * 15.0;
        }
        CHECK(std::abs(got[i] - sum) <= 1e-6 * size);
      }
    }
  }
  CHECK(select(best()));
}

void test_corrupt() {
  Weight w = make({17, 200, 64, true, false, true, Dtype::f16, 4});
  ZonedMatmulParams p;
  p.weight = w.view;
  ++p.weight.salient_zone_words;
  CHECK(zoned_matmul(p) == Status::corrupt && zoned_dequantize(p.weight, nullptr, serial_for) == Status::corrupt);
  p.weight = w.view;
  p.weight.block = 40;
  CHECK(zoned_matmul(p) == Status::bad_argument);
  p.weight = w.view;
  p.m = -1;
  CHECK(zoned_matmul(p) == Status::bad_size);
}

}  // namespace

int main() {
  for (const int64_t k : {0, 1, 31, 33, 128, 200, 300}) {
    for (const int64_t n : {0, 1, 17, 70}) {
      for (const uint32_t salient : {0u, 3u, 16u}) {
        compare({n, k, 128, true, false, false, Dtype::f16, salient}, n == 17 ? 7 : 1);
        compare({n, k, 32, false, true, false, Dtype::f32, salient}, 1);
        compare({n, k, 96, true, false, true, Dtype::f32, salient}, n == 17 ? 5 : 2);
        compare({n, k, 64, false, true, true, Dtype::f16, salient}, 4);
      }
    }
  }
  // Blocks wider than a panel, more rows than share one.
  for (const uint32_t salient : {0u, 5u, 14u}) {
    compare({33, 520, 256, true, true, true, Dtype::f16, salient}, 131);
    compare({17, 300, 160, false, false, false, Dtype::f32, salient}, 3);
    compare({17, 300, 288, true, false, false, Dtype::f32, salient}, 1);
  }
  test_corrupt();
  return bitmill_test::failures() ? 1 : 0;
}
