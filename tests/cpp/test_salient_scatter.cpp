// SPDX-License-Identifier: Apache-2.0
// The partially binarised product and its dense form against a double reference, and arrays that contradict each other.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "int8.h"
#include "layout.h"
#include "salient_problems.h"
#include "salient_scatter.h"
#include "threads.h"

namespace {

using namespace bitmill;
using namespace bitmill_test;

// Parts of 5, the last one first.
void fives_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  for (int64_t part = begin + (end - begin - 1) / 5 * 5; part >= begin; part -= 5) {
    body(context, part, std::min(end, part + 5));
  }
}

// x as the product sees it: itself, or rounded to int8.
template <class T>
std::vector<double> activations(const std::vector<T>& x, int64_t m, int64_t k, Dtype dtype, bool int8) {
  std::vector<double> rows;
  if (!int8) {
    for (const T& value : x) rows.push_back(double(to_float(value)));
    return rows;
  }
  std::vector<int8_t> q(x.size());
  std::vector<float> scale(m);
  Int8QuantizeParams p;
  p.x = x.data(), p.dtype = dtype, p.m = m, p.k = k, p.q = q.data(), p.scale = scale.data();
  CHECK(int8_quantize(p) == Status::ok);
  for (size_t i = 0; i < q.size(); ++i) rows.push_back(double(q[i]) * double(scale[i / k]));
  return rows;
}

// On every instruction set that this machine has.
template <class T>
void check_matmul(const Case& c, const Weight& w, int64_t m, Dtype dtype, double rounding, bool int8,
                  std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<T> x(m * c.k), out(m * c.n), again(m * c.n);
  for (T& value : x) store(uniform(random), &value);
  std::vector<float> bias(c.n);
  for (float& value : bias) value = uniform(random);
  const std::vector<double> rows = activations(x, m, c.k, dtype, int8);
  SalientMatmulParams p;
  p.weight = w.view;
  p.x = x.data();
  p.dtype = dtype;
  p.int8 = int8;
  p.m = m;
  p.bias = m % 2 ? bias.data() : nullptr;
  std::vector<double> sum(m * c.n), allowed(m * c.n);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t output = 0; output < c.n; ++output) {
      double total = p.bias ? bias[output] : 0.0, magnitude = std::fabs(total);
      for (int64_t column = 0; column < c.k; ++column) {
        const double term = rows[row * c.k + column] * w.dense[output * c.k + column];
        total += term;
        magnitude += std::fabs(term);
      }
      sum[row * c.n + output] = total;
      allowed[row * c.n + output] = magnitude * 1e-5 + std::fabs(total) * rounding + 1e-5;
    }
  }
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    std::fill(out.begin(), out.end(), T{});
    std::fill(again.begin(), again.end(), T{});
    p.parallel_for = serial_for;
    p.out = out.data();
    CHECK(salient_matmul(p) == Status::ok);
    for (size_t i = 0; i < sum.size(); ++i) CHECK(std::fabs(double(to_float(out[i])) - sum[i]) <= allowed[i]);
    for (const ParallelFor parallel_for : {reversed_for, fives_for}) {
      p.parallel_for = parallel_for;
      p.out = again.data();
      CHECK(salient_matmul(p) == Status::ok);
      for (size_t i = 0; i < sum.size(); ++i) CHECK(to_float(out[i]) == to_float(again[i]));
    }
  }
  select(best());
}

void check_dequantize(const Case& c, const Weight& w) {
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    std::vector<float> dense(c.n * c.k);
    CHECK(salient_dequantize(w.view, dense.data(), reversed_for) == Status::ok);
    for (size_t i = 0; i < dense.size(); ++i) CHECK(std::fabs(double(dense[i]) - w.dense[i]) <= 1e-6);
  }
  select(best());
}

// Codes of 4 bits, two to a byte, give the same numbers as the same codes of 8 bits. Arrays are as long as they must
// be.
void check_pairs(const Case& c, int64_t m, std::mt19937& random) {
  Weight w = make(c, random);
  SalientWeight narrow = w.view;
  narrow.code_bits = 4;
  std::vector<uint8_t> pairs;
  std::vector<int32_t> tiles;
  if (c.encoding == SalientEncoding::columns) {
    const int64_t words = word_count(w.view.entries, 8), pair_words = word_count(w.view.entries, 4);
    tiles.assign(tile_count(c.n) * pair_words * kTileRows, 0);
    for (size_t i = 0; i < w.tiles.size(); ++i) {
      w.tiles[i] &= 0x0F0F0F0F;
      const uint32_t b = static_cast<uint32_t>(w.tiles[i]);
      const uint32_t four = (b & 15) | (b >> 4 & 0xF0) | (b >> 8 & 0xF00) | (b >> 12 & 0xF000);
      const int64_t word = static_cast<int64_t>(i) / kTileRows % words,
                    tile = static_cast<int64_t>(i) / kTileRows / words;
      const int64_t at = (tile * pair_words + word / 2) * kTileRows + static_cast<int64_t>(i) % kTileRows;
      tiles[at] |= static_cast<int32_t>(four << (16 * (word % 2)));
    }
    narrow.value = tiles.data();
  } else {
    for (uint8_t& code : w.code) code &= 15;
    for (size_t i = 0; i < w.code.size(); ++i) {
      if (i % 2 == 0) pairs.push_back(0);
      pairs.back() = static_cast<uint8_t>(pairs.back() | w.code[i] << (i % 2 * 4));
    }
    narrow.value = pairs.data();
    if (c.encoding == SalientEncoding::bitmap) narrow.entries += narrow.entries % 2;
  }
  std::vector<float> x(m * c.k), wanted(m * c.n), got(m * c.n), dense(c.n * c.k), narrow_dense(c.n * c.k);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) - 8.0f;
  CHECK(salient_dequantize(w.view, dense.data(), serial_for) == Status::ok);
  CHECK(salient_dequantize(narrow, narrow_dense.data(), serial_for) == Status::ok);
  CHECK(dense == narrow_dense);
  SalientMatmulParams p;
  p.x = x.data();
  p.m = m;
  for (const bool int8 : {false, true}) {
    p.int8 = int8;
    p.weight = w.view, p.out = wanted.data();
    CHECK(salient_matmul(p) == Status::ok);
    p.weight = narrow, p.out = got.data(), p.parallel_for = reversed_for;
    CHECK(salient_matmul(p) == Status::ok);
    CHECK(wanted == got);
    p.parallel_for = serial_for;
  }
  if (c.encoding != SalientEncoding::columns) {
    narrow.entries += 2;
    CHECK(salient_check(narrow, serial_for) == Status::corrupt);
  }
  narrow.code_bits = 2;
  CHECK(salient_check(narrow, serial_for) == Status::bad_argument);
}

// What the full check says: a product without rows and the dense form make it.
Status status_of(const Weight& w, SalientWeight view) {
  SalientMatmulParams p;
  p.weight = view;
  std::vector<float> dense(w.dense.size());
  const Status status = salient_matmul(p);
  CHECK(salient_dequantize(view, dense.data(), serial_for) == status);
  return status;
}

void check_hostile(std::mt19937& random) {
  const Weight w = make({.n = 19, .k = 70, .fraction = 0.3}, random);
  CHECK(status_of(w, w.view) == Status::ok);
  const auto with_start = [&](auto change) {
    std::vector<int32_t> start = w.start;
    change(start);
    SalientWeight view = w.view;
    view.start = start.data();
    return status_of(w, view);
  };
  CHECK(with_start([](auto& s) { s[0] = 1; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s[0] = -1; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s.back() += 1; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { std::swap(s[4], s[9]); }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s[5] += 1; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s[5] = 2147483647; }) == Status::corrupt);
  CHECK(with_start([](auto& s) { s[5] = -2147483647 - 1; }) == Status::corrupt);
  const auto with_bits = [&](const std::vector<int32_t>& mask, const std::vector<int32_t>& sign) {
    SalientWeight view = w.view;
    view.mask = mask.data();
    view.sign = sign.data();
    return status_of(w, view);
  };
  const int64_t lane = kTileRows + 2,
                last = 2 * kTileRows + 2;  // words of row 2: columns 32 ... 63, and 64 ... 95
  std::vector<int32_t> mask = w.mask, sign = w.sign;
  mask[lane] ^= 1;
  CHECK(with_bits(mask, w.sign) == Status::corrupt);
  mask = w.mask;
  std::fill(mask.begin(), mask.end(), -1);
  CHECK(with_bits(mask, w.sign) == Status::corrupt);
  mask = w.mask;
  mask[last] |= static_cast<int32_t>(~0u << 6);  // past k
  mask[3 * kTileRows + kTileRows - 1] = -1;      // past n: row 31
  CHECK(with_bits(mask, w.sign) == Status::ok);
  sign[lane] = w.mask[lane];  // a sign bit of a salient weight
  if (w.mask[lane]) CHECK(with_bits(w.mask, sign) == Status::corrupt);
  SalientWeight view = w.view;
  view.entries -= 1;
  CHECK(status_of(w, view) == Status::corrupt);
  view = w.view;
  view.value_zero = nullptr;
  CHECK(status_of(w, view) == Status::bad_argument);
  view = w.view;
  view.group_size = 16;
  CHECK(status_of(w, view) == Status::bad_argument);
  view = w.view;
  view.n = -1;
  CHECK(status_of(w, view) == Status::bad_size);
  view = w.view;
  view.k = kMaxColumns + 1;
  CHECK(salient_check(view, serial_for) == Status::bad_size);
}

// Bits at random in arrays of the right outline: any answer, but no read outside the arrays.
void check_noise(const Case& c, std::mt19937& random) {
  Weight w = make(c, random);
  for (auto* words : {&w.sign, &w.mask, &w.tiles}) {
    for (int32_t& word : *words) word = static_cast<int32_t>(random());
  }
  for (uint8_t& gap : w.gap) gap = static_cast<uint8_t>(random());
  std::vector<float> dense(c.n * c.k);
  for (const int64_t m : {1, 3, 9, 40}) {
    std::vector<float> x(m * c.k, 1.0f), out(m * c.n);
    SalientMatmulParams p;
    p.weight = w.view;
    p.x = x.data();
    p.m = m;
    p.out = out.data();
    for (const bool int8 : {false, true}) {
      p.int8 = int8;
      CHECK(salient_matmul(p) == Status::ok);
    }
    p.m = 0;
    CHECK(salient_matmul(p) == Status::corrupt);
  }
  CHECK(salient_dequantize(w.view, dense.data(), serial_for) == Status::corrupt);
}

void check_hostile_columns(std::mt19937& random) {
  Weight w = make({.n = 19, .k = 70, .fraction = 0.5, .encoding = SalientEncoding::columns}, random);
  const auto with_column = [&](size_t i, int32_t value) {
    std::vector<int32_t> column = w.column;
    column[i] = value;
    SalientWeight view = w.view;
    view.column = column.data();
    return salient_check(view, serial_for);
  };
  CHECK(salient_check(w.view, serial_for) == Status::ok);
  CHECK(with_column(0, -1) == Status::corrupt);
  CHECK(with_column(w.column.size() - 1, 70) == Status::corrupt);
  CHECK(with_column(1, w.column[0]) == Status::corrupt);
  CHECK(with_column(2, 2147483647) == Status::corrupt);
}

void check_products(std::mt19937& random) {
  for (Case c : kSalientCases) {
    for (const auto encoding : {SalientEncoding::bitmap, SalientEncoding::list, SalientEncoding::columns}) {
      c.encoding = encoding;
      const Weight w = make(c, random);
      check_dequantize(c, w);
      for (const bool int8 : {false, true}) {
        for (const int64_t m : {0, 1, 2, 3, 5, 9, 17, 70}) check_matmul<float>(c, w, m, Dtype::f32, 1e-6, int8, random);
        check_matmul<BFloat16>(c, w, 3, Dtype::bf16, 0x1p-8, int8, random);
        check_matmul<Float16>(c, w, 9, Dtype::f16, 0x1p-11, int8, random);
      }
    }
  }
  // More tiles, windows of columns, and blocks of rows than are multiplied together.
  for (Case c : {Case{.n = 300, .k = 90, .fraction = 0.3}, Case{.n = 19, .k = 1700, .group_size = 96, .fraction = 0.6},
                 Case{.n = 5, .k = 17000, .fraction = 0.02}}) {
    for (const auto encoding : {SalientEncoding::bitmap, SalientEncoding::list, SalientEncoding::columns}) {
      c.encoding = encoding;
      const Weight w = make(c, random);
      for (const int64_t m : {4, 70}) {
        check_matmul<float>(c, w, m, Dtype::f32, 1e-6, false, random);
        check_matmul<BFloat16>(c, w, m, Dtype::bf16, 0x1p-8, true, random);
      }
    }
  }
}

// More rows than a block, a part and what is prepared together have, in parts of threads that begin inside a block.
void check_blocks_of_rows(std::mt19937& random) {
  for (const auto encoding : {SalientEncoding::bitmap, SalientEncoding::list, SalientEncoding::columns}) {
    const Case c{.n = 150, .k = 40, .fraction = 0.2, .encoding = encoding};
    const Weight w = make(c, random);
    for (const int64_t m : {127, 128, 197, 260, 321, 1090}) {
      check_matmul<float>(c, w, m, Dtype::f32, 1e-6, false, random);
      check_matmul<BFloat16>(c, w, m, Dtype::bf16, 0x1p-8, true, random);
    }
  }
}

void check_arrays(std::mt19937& random) {
  for (const auto encoding : {SalientEncoding::bitmap, SalientEncoding::list, SalientEncoding::columns}) {
    for (const int64_t m : {1, 9, 70}) {
      check_pairs({.n = 19, .k = 71, .fraction = 0.3, .encoding = encoding}, m, random);
      check_pairs({.n = 37, .k = 601, .group_size = 64, .fraction = 0.1, .encoding = encoding}, m, random);
    }
  }
  for (const bool codes : {true, false}) {
    for (const int64_t k : {33, 70, 600}) {
      for (const auto encoding : {SalientEncoding::bitmap, SalientEncoding::list, SalientEncoding::columns}) {
        check_noise({.n = 19, .k = k, .fraction = 0.3, .codes = codes, .encoding = encoding}, random);
      }
    }
  }
  check_hostile(random);
  check_hostile_columns(random);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  check_products(random);
  check_blocks_of_rows(random);
  for (const InstructionSet set : kInstructionSets) {
    if (select(set)) check_arrays(random);
  }
  return bitmill_test::failures() != 0;
}
