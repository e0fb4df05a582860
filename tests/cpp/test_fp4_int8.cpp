// SPDX-License-Identifier: Apache-2.0
// int8 activations times FP4 weights: the integers of a table, the widest sums, activations rounded by the way, and
// every kernel that this machine can run against the generic form bit for bit. Buffers end where the arrays end, so
// that the sanitizer sees a read past them.
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "bitpack.h"
#include "check.h"
#include "cpu.h"
#include "fp4_matmul.h"
#include "layout.h"
#include "threads.h"

using namespace bitmill;

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u; }
float next_float() { return static_cast<float>(static_cast<int>(next())) * 1e-9f; }

void test_integers() {
  const struct {
    Fp4Format format;
    int largest;
    float unit;
  } cases[] = {{kE2M1, 12, 0.5f}, {kE1M2, 7, 0.5f}, {kE3M0, 64, 0.25f}};
  for (const auto& c : cases) {
    const Fp4Table table = fp4_table(c.format);
    Fp4Integers integers;
    CHECK(fp4_integers(table.value, integers) && integers.unit == c.unit && integers.value[7] == c.largest);
    for (int i = 0; i < 16; ++i) CHECK(static_cast<float>(integers.value[i]) * c.unit == table.value[i]);
    CHECK(fp4_int8_columns(integers) == 2147483647 / (127 * c.largest));
  }
  float table[16] = {};
  Fp4Integers integers;
  CHECK(fp4_integers(table, integers) && integers.value[3] == 0 && fp4_int8_columns(integers) > kMaxColumns);
  for (const float first : {-0x1p127f, 0x1p-149f, 0x1.FCp-120f}) {  // 127 units, or 1
    table[3] = first;
    CHECK(fp4_integers(table, integers) && static_cast<float>(integers.value[3]) * integers.unit == first);
  }
  table[0] = 1.0f;
  for (const float other : {0.1f, 128.5f, 0x1p-7f, 0x1p30f, HUGE_VALF, -HUGE_VALF, NAN}) {
    table[3] = other;
    CHECK(!fp4_integers(table, integers));
  }
}

enum class Scales { floats, e8m0, e4m3 };

// Sums of more, or of fewer columns stay within 16 bits; the last has values that none of the formats has.
constexpr Fp4Table kTables[] = {fp4_table(kE2M1),
                                fp4_table(kE1M2),
                                fp4_table(kE3M0),
                                {{0, 1, -1, 2, 3, 5, 9, 30, 4, 8, 12, 16, 25, -3, -29, -30}},
                                {{-1, 3, 5, -64, 0, 1, 2, 127, 4, 8, 16, 32, 64, 100, -100, -127}}};

// Mostly what the formats make; some are NaN, 0, subnormal or negative.
uint8_t next_scale_byte() {
  return static_cast<uint8_t>(next() >> 24 < 255 ? 16 + (next() >> 25) % 100 : next() >> 24);
}

// `extreme`: all activations and all weights are the largest, so that sums of 16 bits would overflow first.
void compare(int64_t m, int64_t n, int64_t k, int64_t group_size, Scales scales, bool grouped_rows, Dtype dtype,
             float global_scale = 0.01f, const Fp4Table& table = kTables[0], bool extreme = false) {
  const bool bytes = scales != Scales::floats;
  const int64_t groups = group_size > 0 ? ceil_div(k, group_size) : 1;
  std::vector<uint8_t> codes(n * k), scale_bytes(n * groups);
  std::vector<int32_t> tiles(tile_count(n) * word_count(k, 4) * kTileRows);
  for (int64_t i = 0; i < n * k; ++i) codes[i] = extreme ? (i / k % 2 ? 15 : 7) : next() >> 28;
  CHECK(tile_pack(codes.data(), n, k, 4, tiles.data()) == Status::ok);
  std::vector<int8_t> q(m * k);
  for (int8_t& value : q) value = static_cast<int8_t>(extreme ? 127 : static_cast<int>(next() >> 8) % 255 - 127);
  std::vector<float> scale(n * groups), row_scale(grouped_rows ? m * groups : m), bias(n);
  for (auto* values : {&scale, &row_scale, &bias}) {
    for (float& value : *values) value = next_float();
  }
  for (uint8_t& byte : scale_bytes) byte = next_scale_byte();
  Fp4MatmulParams p;
  p.x = q.data();
  p.dtype = dtype;
  p.m = m;
  p.row_scale = row_scale.data();
  p.grouped_rows = grouped_rows;
  p.weight = {.tiles = tiles.data(), .n = n, .k = k, .table = table.value};
  p.weight.scale = bytes ? nullptr : scale.data();
  p.weight.scale_bytes = bytes ? scale_bytes.data() : nullptr;
  p.weight.global_scale = scales == Scales::e4m3 ? &global_scale : nullptr;
  p.weight.group_size = group_size;
  p.bias = m % 2 ? bias.data() : nullptr;
  Fp4Integers integers;
  CHECK(fp4_integers(table.value, integers));
  const auto size = static_cast<size_t>(m * n);
  std::vector<float> want(size), got(size);
  std::vector<BFloat16> want_halves(size), got_halves(size);
  p.out = dtype == Dtype::f32 ? static_cast<void*>(want.data()) : want_halves.data();
  detail::fp4_int8_matmul_tiles_generic(p, integers, 0, tile_count(n));
  p.out = dtype == Dtype::f32 ? static_cast<void*>(got.data()) : got_halves.data();
  for (const InstructionSet set : kInstructionSets) {
    if (set == InstructionSet::generic && m * n * k > 20000) continue;  // slow, and the same function as above
    if (!select(set)) continue;
    CHECK(fp4_matmul(p) == Status::ok);
    for (size_t i = 0; i < size; ++i) {
      const float a = dtype == Dtype::f32 ? got[i] : to_float(got_halves[i]);
      const float b = dtype == Dtype::f32 ? want[i] : to_float(want_halves[i]);
      CHECK(a == b || (std::isnan(a) && std::isnan(b)));
    }
    got.assign(size, 0.0f);
    got_halves.assign(size, BFloat16{});
  }
  select(best());
}

// Floats to integers and their product in one, by parts of any shape: as one after the other.
void test_linear(int64_t m, int64_t n, int64_t k, Dtype dtype) {
  std::vector<uint8_t> codes(n * k);
  std::vector<int32_t> tiles(tile_count(n) * word_count(k, 4) * kTileRows);
  for (uint8_t& code : codes) code = next() >> 28;
  CHECK(tile_pack(codes.data(), n, k, 4, tiles.data()) == Status::ok);
  std::vector<float> x(m * k), scale(n * ceil_div(k, kNvBlock));
  std::vector<uint8_t> shift(k);
  for (auto* values : {&x, &scale}) {
    for (float& value : *values) value = next_float();
  }
  for (uint8_t& s : shift) s = next() >> 30;
  const Fp4Table table = fp4_table(kE2M1);
  const auto size = static_cast<size_t>(m * n);
  std::vector<int8_t> q(m * k);
  std::vector<float> row_scale(m * ceil_div(k, kNvBlock)), want(size), got(size);
  Int8QuantizeParams quantize;
  quantize.x = x.data(), quantize.dtype = dtype;  // as halves they are random too
  quantize.m = m, quantize.k = k;
  quantize.q = q.data(), quantize.scale = row_scale.data();
  Fp4ActivationsParams cast;
  cast.x = x.data(), cast.dtype = dtype;
  cast.m = m, cast.k = k;
  cast.scale = 0.1f, cast.shift = shift.data();
  cast.q = q.data(), cast.row_scale = row_scale.data();
  Fp4MatmulParams product;
  product.dtype = dtype;
  product.m = m;
  product.weight = {.tiles = tiles.data(), .n = n, .k = k, .table = table.value, .scale = scale.data()};
  const auto compare_parts = [&](const auto& linear) {
    Fp4MatmulParams p = product;
    p.x = q.data(), p.row_scale = row_scale.data(), p.out = want.data();
    CHECK(fp4_matmul(p) == Status::ok);
    p.x = nullptr, p.row_scale = nullptr, p.out = got.data();
    for (const ParallelFor parallel_for : {serial_for, bitmill_test::reversed_for, bitmill_test::scattered_for}) {
      got.assign(size, -1.0f);
      p.parallel_for = parallel_for;
      CHECK(linear(p) == Status::ok);
      CHECK(std::memcmp(got.data(), want.data(), size * static_cast<size_t>(bytes_of(dtype))) == 0);
    }
  };
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    product.weight.group_size = 0, product.grouped_rows = false;
    CHECK(int8_quantize(quantize) == Status::ok);
    compare_parts([&](const Fp4MatmulParams& p) { return fp4_int8_linear(quantize, p); });
    for (const auto& [kind, width] : {std::pair{Fp4Activations::fpq, int64_t{0}},
                                      {Fp4Activations::mxfp4, kMxBlock},
                                      {Fp4Activations::nvfp4, kNvBlock}}) {
      cast.kind = kind;
      product.weight.group_size = width, product.grouped_rows = width > 0;
      CHECK(fp4_activations(cast) == Status::ok);
      compare_parts([&](const Fp4MatmulParams& p) { return fp4_fp4_linear(cast, p); });
    }
  }
  select(best());
  cast.kind = Fp4Activations::fpq;
  shift[k / 2] = 4;
  CHECK(fp4_fp4_linear(cast, product) == Status::bad_argument);
}

// Sums as large as int32 holds; one column more is refused.
void test_widest_sums() {
  const float table[16] = {127, -127};
  const int64_t most = 2147483647 / (127 * 127);
  const float one = 1.0f;
  std::vector<int8_t> q(most + 1, -127);
  for (const int code : {0, 1}) {
    const std::vector<int32_t> tiles(word_count(most + 1, 4) * kTileRows, 0x11111111 * code);
    float out = 0.0f;
    Fp4MatmulParams p;
    p.x = q.data();
    p.m = 1;
    p.row_scale = &one;
    p.weight = {.tiles = tiles.data(), .n = 1, .k = most, .table = table, .scale = &one};
    p.out = &out;
    for (const InstructionSet set : kInstructionSets) {
      if (!select(set)) continue;
      CHECK(fp4_matmul(p) == Status::ok);
      CHECK(out == static_cast<float>((code ? 1 : -1) * 127 * 127 * most));
      p.weight.k = most + 1;
      CHECK(fp4_matmul(p) == Status::bad_argument);
      p.weight.k = most;
    }
    select(best());
  }
}

}  // namespace

int main() {
  test_integers();
  for (const int64_t group_size : {0, 8, 16, 32, 64, 128}) {
    for (const Scales scales : {Scales::floats, Scales::e8m0, Scales::e4m3}) {
      for (const bool grouped_rows : {false, true}) {
        for (const int64_t m : {0, 1, 2, 5, 8, 13}) {
          compare(m, 19, 77, group_size, scales, grouped_rows, Dtype::f32);
          compare(m, 150, 264, group_size, scales, grouped_rows, Dtype::bf16);
        }
        compare(3, 5, 0, group_size, scales, grouped_rows, Dtype::f32);
        compare(3, 0, 9, group_size, scales, grouped_rows, Dtype::f32);
      }
    }
  }
  for (const Fp4Table& table : kTables) {
    for (const int64_t group_size : {0, 8, 16, 24, 32, 48, 96, 640}) {
      for (const bool grouped_rows : {false, true}) {
        for (const int64_t m : {1, 2, 3, 4, 5, 7, 8, 16, 21}) {
          const Scales scales = m % 2 ? Scales::floats : Scales::e8m0;
          compare(m, 33, 350 - m, group_size, scales, grouped_rows, Dtype::f32, 0.0f, table);
        }
        compare(5, 17, 1300, group_size, Scales::floats, grouped_rows, Dtype::f32, 0.0f, table, true);
        compare(1, 17, 1300, group_size, Scales::floats, grouped_rows, Dtype::f32, 0.0f, table, true);
      }
    }
    compare(70, 40, 104, 32, Scales::e8m0, false, Dtype::f32, 0.0f, table);  // more rows than share a decoded tile
  }
  for (const int64_t group_size : {16, 32}) {  // whole steps of scale bytes, and a shorter one at the end
    for (const Scales scales : {Scales::e8m0, Scales::e4m3}) {
      for (const bool grouped_rows : {false, true}) {
        for (const int64_t groups : {16, 52}) {
          for (const float global_scale : {0.01f, 300.0f, 0x1p-101f, 0x1p-149f, 0x1p127f, -1.0f}) {
            compare(1, 150, groups * group_size, group_size, scales, grouped_rows, Dtype::f32, global_scale);
          }
          for (const int64_t m : {5, 37}) {  // folded after a group, and during the next
            compare(m, 150, groups * group_size, group_size, scales, grouped_rows, Dtype::f32);
          }
        }
      }
    }
  }
  for (const int64_t m : {1, 5, 127, 200, 389}) {
    test_linear(m, 40, 104, m % 2 ? Dtype::f32 : Dtype::bf16);
  }
  test_widest_sums();
  return bitmill_test::failures() != 0;
}
