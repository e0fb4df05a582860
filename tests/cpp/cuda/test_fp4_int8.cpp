// SPDX-License-Identifier: Apache-2.0
// Activations as 4-bit floats and their products with FP4 weights, against core's plain form: everything is equal.
#include <algorithm>

#include "../problems.h"
#include "cpu.h"
#include "cuda_runtime.h"
#include "fp4_activations.h"
#include "launchers.h"

using namespace bitmill;
using namespace bitmill_test;

namespace {

bool same(const std::vector<float>& got, const std::vector<float>& want) {
  return std::equal(got.begin(), got.end(), want.begin(), want.end(),
                    [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); });
}

template <class T>
void casts(Dtype dtype, Fp4Activations kind, Fp4Format format, int64_t m, int64_t k) {
  const std::vector<T> x = random_rows<T>(m * k);
  std::vector<uint8_t> shift(k);
  for (uint8_t& value : shift) value = random_bits() & ((1u << format.exponent_bits) - 1);
  const float scale = 0.3f;
  Fp4ActivationsParams p;
  p.x = x.data();
  p.dtype = dtype;
  p.m = m;
  p.k = k;
  p.kind = kind;
  p.format = format;
  p.scale = scale;
  p.shift = m % 2 ? shift.data() : nullptr;
  for (const ScaleRule rule : {ScaleRule::floor, ScaleRule::rceil}) {
    p.rule = rule;
    std::vector<int8_t> want(m * k), got(m * k, 99);
    std::vector<float> want_scale(m * p.groups()), got_scale(m * p.groups());
    p.scale = scale;
    p.q = want.data();
    p.row_scale = want_scale.data();
    CHECK(fp4_activations(p) == Status::ok);
    p.q = got.data();
    p.row_scale = got_scale.data();
    CHECK(cuda::launch_fp4_activations(p, nullptr) == Status::ok);
    CHECK(got == want && same(got_scale, want_scale));
    std::fill(got.begin(), got.end(), int8_t{99});
    p.scale = NAN;  // that on the device counts
    CHECK(cuda::launch_fp4_activations(p, nullptr, &scale) == Status::ok);
    CHECK(got == want && same(got_scale, want_scale));
  }
}

enum class Scale { floats, e8m0, e4m3 };

void multiplies(int64_t m, int64_t n, int64_t k, int64_t group_size, Scale kind, const Fp4Table& table, bool off) {
  const int64_t groups = group_size > 0 ? ceil_div(k, group_size) : 1;
  std::vector<uint8_t> codes(n * k), bytes(n * groups);
  for (uint8_t& code : codes) code = random_bits() & 15u;
  std::vector<int32_t> tiles(tile_count(n) * word_count(k, 4) * kTileRows);
  CHECK(tile_pack(codes.data(), n, k, 4, tiles.data()) == Status::ok);
  for (uint8_t& byte : bytes)
    byte = static_cast<uint8_t>(kind == Scale::e8m0 ? 120 + random_bits() % 9 : random_bits());
  std::vector<int8_t> q(m * k + 1);
  for (int8_t& value : q) value = static_cast<int8_t>(static_cast<int>(random_bits() % 255) - 127);
  const std::vector<float> scale = random_scales(n * groups), bias = random_scales(n), global = {0.3f};
  const std::vector<float> row_scale = random_scales(m * groups);
  std::vector<float> want(m * n), got(m * n);
  Fp4MatmulParams p;
  p.x = q.data() + (off ? 1 : 0);
  p.m = m;
  p.row_scale = row_scale.data();
  p.grouped_rows = group_size > 0;
  p.weight = {.tiles = tiles.data(), .n = n, .k = k, .table = table.value};
  p.weight.group_size = group_size;
  p.weight.scale = kind == Scale::floats ? scale.data() : nullptr;
  p.weight.scale_bytes = kind == Scale::floats ? nullptr : bytes.data();
  p.weight.global_scale = kind == Scale::e4m3 ? global.data() : nullptr;
  p.bias = m % 2 ? bias.data() : nullptr;
  Fp4Integers integers;
  CHECK(fp4_integers(table.value, integers));
  p.out = want.data();
  CHECK(fp4_matmul(p) == Status::ok);
  p.out = got.data();
  CHECK(cuda::launch_fp4_int8_matmul(p, integers, nullptr) == Status::ok);
  CHECK(same(got, want));
}

}  // namespace

int main() {
  select(InstructionSet::generic);
  for (const int64_t k : {0, 1, 15, 16, 17, 32, 33, 48, 77, 128, 200, 520}) {
    for (const int64_t m : {0, 1, 10}) {
      casts<float>(Dtype::f32, Fp4Activations::fpq, kE2M1, m, k);
      casts<BFloat16>(Dtype::bf16, Fp4Activations::fpq, kE1M2, m, k);
      casts<float>(Dtype::f32, Fp4Activations::mxfp4, kE2M1, m, k);
      casts<Float16>(Dtype::f16, Fp4Activations::mxfp4, kE2M1, m, k);
      casts<float>(Dtype::f32, Fp4Activations::nvfp4, kE2M1, m, k);
      casts<BFloat16>(Dtype::bf16, Fp4Activations::nvfp4, kE2M1, m, k);
    }
  }
  const Fp4Table wide{{-127, 127, 3, 5, -64, 0, 1, -1, 2, 4, 8, 16, 32, 64, 100, -100}};
  for (const bool off : {false, true}) {
    emulation::last_to_first = off;
    for (const int64_t m : {0, 1, 8, 9, 35}) {
      for (const int64_t k : {0, 1, 31, 77, 264, 1100, 2080}) {
        multiplies(m, 19, k, 0, Scale::floats, fp4_table(kE2M1), off);
        multiplies(m, 33, k, 0, Scale::floats, wide, off);
        multiplies(m, 19, k, 16, Scale::e4m3, fp4_table(kE2M1), off);
        multiplies(m, 16, k, 32, Scale::e8m0, wide, off);
        multiplies(m, 5, k, 32, Scale::floats, fp4_table(kE1M2), off);
      }
    }
  }
  Fp4MatmulParams p;
  p.m = 1;
  CHECK(cuda::launch_fp4_int8_matmul(p, {}, nullptr) == Status::bad_argument);  // no scale of the row
  Fp4ActivationsParams q;
  q.format = kE3M0;
  CHECK(cuda::launch_fp4_activations(q, nullptr) == Status::bad_argument);
  return failures() != 0;
}
