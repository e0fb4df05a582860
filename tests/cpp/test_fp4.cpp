// SPDX-License-Identifier: Apache-2.0
// Code tables, ties, special values, E8M0, the scale rules of MXFP4, and the product against a double reference, on
// every instruction set of this machine.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "bitpack.h"
#include "check.h"
#include "cpu.h"
#include "fp4_matmul.h"
#include "layout.h"
#include "threads.h"

namespace {

using namespace bitmill;
using bitmill_test::reversed_for;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Named {
  Fp4Format format;
  float values[8];
  float ties[7];     // the middle of value i and value i + 1
  int tie_codes[7];  // and where it goes
};

const Named kFormats[] = {
    {kE2M1, {0, .5f, 1, 1.5f, 2, 3, 4, 6}, {.25f, .75f, 1.25f, 1.75f, 2.5f, 3.5f, 5}, {0, 2, 2, 4, 4, 6, 6}},
    {kE1M2,
     {0, .5f, 1, 1.5f, 2, 2.5f, 3, 3.5f},
     {.25f, .75f, 1.25f, 1.75f, 2.25f, 2.75f, 3.25f},
     {0, 2, 2, 4, 4, 6, 6}},
    {kE3M0, {0, .25f, .5f, 1, 2, 4, 8, 16}, {.125f, .375f, .75f, 1.5f, 3, 6, 12}, {0, 2, 3, 4, 5, 6, 7}},
};

Status cast(const std::vector<float>& x, Fp4Format format, NanPolicy nan, std::vector<int>& codes) {
  std::vector<uint8_t> packed(static_cast<size_t>(ceil_div(std::ssize(x), 2)), 0xAA);
  Fp4CastParams p;
  p.x = x.data();
  p.m = 1;
  p.k = p.row_stride = std::ssize(x);
  p.format = format;
  p.nan = nan;
  p.packed = packed.data();
  const Status status = fp4_cast(p);
  codes.clear();
  for (size_t i = 0; i < x.size(); ++i) codes.push_back((packed[i / 2] >> (4 * (i % 2))) & 15);
  if (x.size() % 2) CHECK(packed.back() >> 4 == 0);
  return status;
}

int code_of(float x, Fp4Format format, NanPolicy nan = NanPolicy::max) {
  std::vector<int> codes;
  CHECK(cast({x}, format, nan, codes) == Status::ok);
  return codes[0];
}

void test_tables_and_ties() {
  for (const Named& named : kFormats) {
    std::vector<uint8_t> packed(8);
    for (int i = 0; i < 8; ++i) packed[i] = static_cast<uint8_t>(2 * i | ((2 * i + 1) << 4));
    std::vector<float> values(16);
    CHECK(fp4_uncast(packed.data(), 1, 16, named.format, values.data()) == Status::ok);
    for (int i = 0; i < 8; ++i) {
      CHECK(values[i] == named.values[i] && values[i + 8] == -named.values[i] && std::signbit(values[i + 8]));
      CHECK(code_of(named.values[i], named.format) == i && code_of(-named.values[i], named.format) == i + 8);
    }
    for (int i = 0; i < 7; ++i) {
      const float tie = named.ties[i];
      CHECK(tie == (named.values[i] + named.values[i + 1]) / 2);
      CHECK(code_of(tie, named.format) == named.tie_codes[i]);
      CHECK(code_of(-tie, named.format) == named.tie_codes[i] + 8);
      CHECK(code_of(std::nextafter(tie, 0.0f), named.format) == i);
      CHECK(code_of(std::nextafter(tie, kInfinity), named.format) == i + 1);
    }
  }
}

void test_special_values() {
  for (const Named& named : kFormats) {
    CHECK(code_of(kInfinity, named.format) == 7 && code_of(-kInfinity, named.format) == 15);
    CHECK(code_of(1e30f, named.format) == 7 && code_of(-1e30f, named.format) == 15);
    CHECK(code_of(-1e-45f, named.format) == 8 && code_of(1e-45f, named.format) == 0);
    for (const float nan : {kNan, -kNan}) {
      CHECK(code_of(nan, named.format) == 7 && code_of(nan, named.format, NanPolicy::zero) == 0);
      std::vector<int> codes;
      CHECK(cast({1.0f, nan, 1.0f}, named.format, NanPolicy::error, codes) == Status::bad_argument);
    }
    std::vector<int> codes;
    CHECK(cast({1.0f, kInfinity}, named.format, NanPolicy::error, codes) == Status::ok);
    CHECK(cast({}, named.format, NanPolicy::max, codes) == Status::ok);
  }
  Fp4CastParams p;
  p.m = -1;
  CHECK(fp4_cast(p) == Status::bad_size);
  p.m = 0;
  p.k = kMaxColumns + 1;
  CHECK(fp4_cast(p) == Status::bad_size);
}

// Rows with a stride, cast in parts, in every dtype: each element as if it were alone.
void test_rows() {
  constexpr int64_t m = 40, k = 1001, stride = 1003, bytes = 501;
  std::mt19937 random(1);
  std::vector<uint16_t> x(m * stride);
  for (uint16_t& bits : x) bits = static_cast<uint16_t>(random());
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    std::vector<uint8_t> packed(m * bytes);
    Fp4CastParams p{.x = x.data(), .dtype = dtype, .m = m, .k = k, .row_stride = stride, .format = kE3M0};
    p.packed = packed.data();
    p.parallel_for = reversed_for;
    CHECK(fp4_cast(p) == Status::ok);
    for (int64_t i = 0; i < m * k; ++i) {
      const int64_t row = i / k, column = i % k;
      const uint16_t bits = x[row * stride + column];
      const float value = dtype == Dtype::bf16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
      CHECK(((packed[row * bytes + column / 2] >> (4 * (column % 2))) & 15) == code_of(value, kE3M0));
    }
  }
}

void test_e8m0() {
  struct Case {
    float x;
    int down, up;
  };
  const Case cases[] = {{1, 127, 127},
                        {-3, 128, 129},
                        {0x1p-127f, 0, 0},
                        {0x1.8p-127f, 0, 1},
                        {0x1p-126f, 1, 1},
                        {0, 0, 0},
                        {1e-45f, 0, 0},
                        {0x1p127f, 254, 254},
                        {0x1.8p127f, 254, 254},
                        {kInfinity, 254, 254},
                        {-kInfinity, 254, 254},
                        {kNan, 255, 255},
                        {0x1.fffffep0f, 127, 128}};
  for (const Case& c : cases) {
    uint8_t down, up;
    CHECK(e8m0_cast(&c.x, Dtype::f32, 1, false, &down) == Status::ok && down == c.down);
    CHECK(e8m0_cast(&c.x, Dtype::f32, 1, true, &up) == Status::ok && up == c.up);
  }
  for (int byte = 0; byte < 256; ++byte) {
    const uint8_t code = static_cast<uint8_t>(byte);
    float value;
    CHECK(e8m0_uncast(&code, 1, &value) == Status::ok);
    CHECK(byte == 255 ? std::isnan(value) : static_cast<double>(value) == std::ldexp(1.0, byte - 127));
  }
  CHECK(e8m0_cast(nullptr, Dtype::f32, -1, true, nullptr) == Status::bad_size);
}

// One block whose largest magnitude is `amax`.
int scale_of(float amax, ScaleRule rule) {
  const float x[3] = {0.0f, -amax, amax / 2};
  uint8_t packed[2], scale;
  Mxfp4QuantizeParams p{.x = x, .m = 1, .k = 3, .row_stride = 3, .rule = rule, .packed = packed, .scale = &scale};
  CHECK(mxfp4_quantize(p) == Status::ok);
  return scale;
}

void test_scale_rules() {
  struct Case {
    float amax;
    int floor, rceil, ceil, even;
  };
  const float below = 0x1.fffffep1f;  // just below 4
  const Case cases[] = {
      {4, 127, 127, 127, 127},
      {below, 126, 127, 127, 127},
      {6, 127, 127, 128, 127},
      {0x1.800002p2f, 127, 128, 128, 127},
      {7, 127, 128, 128, 128},
      {6.5f, 127, 128, 128, 127},
      {3, 126, 126, 127, 126},
      {3.5f, 126, 127, 127, 127},
      {0, 0, 0, 0, 0},
      {1e-40f, 0, 0, 0, 0},
      {0x1p-125f, 0, 0, 0, 0},
      {0x1p-123f, 2, 2, 2, 2},
      {kInfinity, 255, 255, 255, 255},
      {kNan, 255, 255, 255, 255},
      {3.4e38f, 252, 253, 253, 255},
      {0x1.bffffep127f, 252, 253, 253, 252},
  };
  for (const Case& c : cases) {
    CHECK(scale_of(c.amax, ScaleRule::floor) == c.floor);
    CHECK(scale_of(c.amax, ScaleRule::rceil) == c.rceil);
    CHECK(scale_of(c.amax, ScaleRule::ceil) == c.ceil);
    CHECK(scale_of(c.amax, ScaleRule::even) == c.even);
  }
}

// Every block's codes are the casts of its values divided by its scale, the partial last block included.
void test_mxfp4_blocks() {
  constexpr int64_t m = 9, k = 77, blocks = 3, bytes = 39;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> x(m * k);
  for (float& value : x) value = std::ldexp(normal(random), static_cast<int>(random() % 9));
  x[5] = kNan;
  for (const ScaleRule rule : {ScaleRule::floor, ScaleRule::rceil, ScaleRule::ceil, ScaleRule::even}) {
    std::vector<uint8_t> packed(m * bytes), scale(m * blocks);
    Mxfp4QuantizeParams p{.x = x.data(), .m = m, .k = k, .row_stride = k, .rule = rule};
    p.packed = packed.data();
    p.scale = scale.data();
    p.parallel_for = reversed_for;
    CHECK(mxfp4_quantize(p) == Status::ok);
    std::vector<float> values(m * k);
    CHECK(mxfp4_dequantize(packed.data(), scale.data(), m, k, values.data(), reversed_for) == Status::ok);
    for (int64_t i = 0; i < m * k; ++i) {
      const int64_t row = i / k, column = i % k, block = row * blocks + column / 32;
      const int code = (packed[row * bytes + column / 2] >> (4 * (column % 2))) & 15;
      if (block == 0) {
        CHECK(scale[block] == 255 && code == 0 && std::isnan(values[i]));
        continue;
      }
      const float unit = e8m0_to_float(scale[block]);
      CHECK(code == code_of(x[i] / unit, kE2M1));
      CHECK(values[i] == unit * fp4_table(kE2M1).value[code]);
    }
    for (int64_t row = 0; row < m; ++row) CHECK(packed[row * bytes + bytes - 1] >> 4 == 0);
  }
}

void test_matmul(int64_t m, int64_t n, int64_t k, int64_t group_size, bool bytes, Dtype dtype) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const int64_t groups = group_size ? ceil_div(k, group_size) : 1;
  std::vector<uint8_t> codes(n * k), scale_bytes(n * groups);
  std::vector<float> x(m * k), scale(n * groups), bias(n), table(16);
  std::vector<uint16_t> halves(m * k);
  for (uint8_t& code : codes) code = random() % 16;
  for (float& value : table) value = normal(random);
  for (float& value : bias) value = normal(random);
  for (int64_t i = 0; i < n * groups; ++i) {
    scale_bytes[i] = static_cast<uint8_t>(120 + random() % 14);
    scale[i] = bytes ? e8m0_to_float(scale_bytes[i]) : normal(random);
  }
  for (int64_t i = 0; i < m * k; ++i) {
    BFloat16 rounded;
    store(normal(random), &rounded);
    halves[i] = rounded.bits;
    x[i] = to_float(rounded);
  }
  std::vector<int32_t> tiles(tile_count(n) * word_count(k, 4) * kTileRows);
  CHECK(tile_pack(codes.data(), n, k, 4, tiles.data()) == Status::ok);

  Fp4Weight weight{.tiles = tiles.data(), .n = n, .k = k, .table = table.data()};
  weight.scale = bytes ? nullptr : scale.data();
  weight.scale_bytes = bytes ? scale_bytes.data() : nullptr;
  weight.group_size = group_size;
  std::vector<float> dense(n * k);
  CHECK(fp4_weight(weight, dense.data(), reversed_for) == Status::ok);
  std::vector<float> out(m * n);
  std::vector<BFloat16> out_halves(m * n);
  Fp4MatmulParams p{.dtype = dtype, .m = m, .weight = weight, .bias = bias.data()};
  p.x = dtype == Dtype::f32 ? static_cast<const void*>(x.data()) : halves.data();
  p.out = dtype == Dtype::f32 ? static_cast<void*>(out.data()) : out_halves.data();
  p.parallel_for = reversed_for;
  CHECK(fp4_matmul(p) == Status::ok);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t o = 0; o < n; ++o) {
      double sum = bias[o], size = std::fabs(bias[o]);
      for (int64_t j = 0; j < k; ++j) {
        const float factor = scale[o * groups + (group_size ? j / group_size : 0)];
        CHECK(dense[o * k + j] == factor * table[codes[o * k + j]]);
        const double product = static_cast<double>(factor) * table[codes[o * k + j]] * x[row * k + j];
        sum += product;
        size += std::fabs(product);
      }
      const float got = dtype == Dtype::f32 ? out[row * n + o] : to_float(out_halves[row * n + o]);
      CHECK(std::fabs(got - sum) <=
            size * 1e-6 * std::sqrt(k + 1.0) + (dtype == Dtype::f32 ? 0 : std::fabs(sum) / 256));
    }
  }
}

// Row counts around blocks of 6 rows with what is left over, columns around panels of 192 that groups do not divide:
// the bits of a row are those that it has alone.
void test_rows_alone(int64_t group_size, bool halves) {
  constexpr int64_t most = 14, n = 70, k = 413;
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  const int64_t groups = group_size ? ceil_div(k, group_size) : 1;
  std::vector<int32_t> tiles(tile_count(n) * word_count(k, 4) * kTileRows);
  for (int32_t& word : tiles) word = static_cast<int32_t>(random());
  std::vector<float> x(most * k), scale(n * groups), out(most * n), alone(n), table(16);
  for (auto* values : {&x, &scale, &table}) {
    for (float& value : *values) value = normal(random);
  }
  if (halves) std::copy_n(fp4_table(kE2M1).value, 16, table.data());
  Fp4MatmulParams p{.x = x.data(), .weight = {.tiles = tiles.data(), .n = n, .k = k, .table = table.data()}};
  p.weight.scale = scale.data();
  p.weight.group_size = group_size;
  for (int64_t m = 1; m <= most; ++m) {
    p.m = m;
    p.x = x.data();
    p.out = out.data();
    p.parallel_for = reversed_for;
    CHECK(fp4_matmul(p) == Status::ok);
    p.m = 1;
    p.out = alone.data();
    p.parallel_for = serial_for;
    for (int64_t row = 0; row < m; ++row) {
      p.x = x.data() + row * k;
      CHECK(fp4_matmul(p) == Status::ok && std::equal(alone.begin(), alone.end(), out.begin() + row * n));
    }
  }
}

void test_e4m3_scales() {
  const int32_t tiles[kTileRows] = {3};  // one weight of code 3
  const float global_scale = 0.01f;
  const Fp4Table table = fp4_table(kE2M1);
  for (int byte = 0; byte < 256; ++byte) {
    const int field = byte >> 3 & 15, mantissa = byte & 7;
    const float magnitude = std::ldexp(static_cast<float>(field ? 8 + mantissa : mantissa), (field ? field : 1) - 10);
    const float value = byte < 128 ? magnitude : -magnitude;
    const uint8_t scale = static_cast<uint8_t>(byte);
    Fp4Weight weight{.tiles = tiles, .n = 1, .k = 1, .table = table.value};
    weight.scale_bytes = &scale;
    weight.global_scale = &global_scale;
    float dense;
    CHECK(fp4_weight(weight, &dense) == Status::ok);
    const bool nan = (byte & 127) == 127;
    CHECK(nan ? std::isnan(dense) && std::isnan(e4m3_to_float(scale)) : e4m3_to_float(scale) == value);
    CHECK(nan || dense == value * 1.5f * global_scale);
  }
}

void test_bad_weights() {
  const float one = 1;
  const uint8_t byte = 127;
  float value;
  Fp4Weight weight{.table = &one};
  CHECK(fp4_weight(weight, &value) == Status::ok);  // 0 x 0 needs no scale
  weight.n = 1;
  CHECK(fp4_weight(weight, &value) == Status::bad_argument);
  weight.scale = &one;
  CHECK(fp4_weight(weight, &value) == Status::ok);
  weight.scale_bytes = &byte;
  CHECK(fp4_weight(weight, &value) == Status::bad_argument);  // two scales
  weight.global_scale = &one;
  weight.scale_bytes = nullptr;
  CHECK(fp4_weight(weight, &value) == Status::bad_argument);  // of bytes only
  weight.global_scale = nullptr;
  weight.group_size = 12;
  CHECK(fp4_matmul({.weight = weight}) == Status::bad_argument);
  weight.group_size = 0;
  weight.n = -1;
  CHECK(fp4_matmul({.weight = weight}) == Status::bad_size);
  CHECK(fp4_matmul({.m = -1, .weight = {}}) == Status::bad_size);
}

}  // namespace

int main() {
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    test_tables_and_ties();
    test_special_values();
    test_rows();
    test_e8m0();
    test_scale_rules();
    test_mxfp4_blocks();
    for (const bool bytes : {false, true}) {
      for (const int64_t group_size : {0, 8, 32, 64}) {
        test_matmul(3, 19, 77, group_size, bytes, Dtype::f32);
        test_matmul(2, 16, 600, group_size, bytes, Dtype::bf16);
        test_matmul(0, 5, 9, group_size, bytes, Dtype::f32);
        test_matmul(2, 3, 0, group_size, bytes, Dtype::f32);
      }
    }
    test_matmul(1, 40, 413, 0, false, Dtype::f32);
    test_matmul(8, 33, 413, 128, false, Dtype::f32);
    test_matmul(13, 33, 400, 16, true, Dtype::bf16);
    for (const int64_t group_size : {0, 16, 128}) {
      for (const bool halves : {false, true}) test_rows_alone(group_size, halves);
    }
    test_e4m3_scales();
    test_bad_weights();
  }
  return bitmill_test::failures() != 0;
}
