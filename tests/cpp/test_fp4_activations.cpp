// SPDX-License-Identifier: Apache-2.0
// Activations as 4-bit floats: known numbers, and every kernel that this machine can run against the generic form bit
// for bit. Buffers end where the arrays end, so that the sanitizer sees a read or a write past them.
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "fp4_activations.h"

using namespace bitmill;

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u; }

// Floats of all kinds around 1, NaN, infinities and subnormals too.
float next_float() {
  const uint32_t bits = next();
  if (bits >> 24 == 7) return std::bit_cast<float>(next());
  return std::bit_cast<float>((bits & 0x80FFFFFFu) | (0x3Bu + (bits >> 24) % 10u) << 23 | 0x20000000u);
}

void compare(Fp4Activations kind, Fp4Format format, ScaleRule rule, int64_t m, int64_t k, Dtype dtype) {
  std::vector<float> x(m * k);
  std::vector<BFloat16> halves(m * k);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = next_float();
    store(x[i], &halves[i]);
  }
  std::vector<uint8_t> shift(k);
  for (uint8_t& value : shift) value = next() >> 24 & ((1u << format.exponent_bits) - 1);
  Fp4ActivationsParams p;
  p.x = dtype == Dtype::f32 ? static_cast<const void*>(x.data()) : halves.data();
  p.dtype = dtype;
  p.m = m;
  p.k = k;
  p.kind = kind;
  p.format = format;
  p.scale = 0.3f;
  p.shift = m % 2 ? shift.data() : nullptr;
  p.rule = rule;
  const auto scales = static_cast<size_t>(m * p.groups());
  std::vector<int8_t> want(m * k), got(m * k);
  std::vector<float> want_scale(scales), got_scale(scales);
  CHECK(select(InstructionSet::generic));
  p.q = want.data();
  p.row_scale = want_scale.data();
  CHECK(fp4_activations(p) == Status::ok);
  p.q = got.data();
  p.row_scale = got_scale.data();
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    CHECK(fp4_activations(p) == Status::ok);
    CHECK(got == want);
    for (size_t i = 0; i < scales; ++i) {
      CHECK(got_scale[i] == want_scale[i] || (std::isnan(got_scale[i]) && std::isnan(want_scale[i])));
    }
    got.assign(got.size(), 1);
    got_scale.assign(scales, 0.0f);
  }
  select(best());
}

void test_known_numbers() {
  const float x[] = {0.0f, 6.0f, -100.0f, 0.5f, 0.25f, NAN};
  const uint8_t shift[] = {0, 0, 0, 3, 1, 0};
  int8_t q[6];
  float scale;
  Fp4ActivationsParams p;
  p.x = x;
  p.m = 1;
  p.k = 5;
  p.shift = shift;
  p.q = q;
  p.row_scale = &scale;
  CHECK(fp4_activations(p) == Status::ok);
  const int8_t want[] = {0, 96, -96, 8, 4};  // sixteenths
  CHECK(std::memcmp(q, want, 5) == 0 && scale == 1.0f / 16);
  p.k = 6;
  CHECK(fp4_activations(p) == Status::ok && std::isnan(scale) && q[5] == 0);
  p.format = kE3M0;
  CHECK(fp4_activations(p) == Status::bad_argument);
  p.format = kE1M2;
  CHECK(fp4_activations(p) == Status::bad_argument);  // a shift of 3
  p.kind = Fp4Activations::mxfp4;
  p.k = 5;
  p.format = kE2M1;
  CHECK(fp4_activations(p) == Status::ok && scale == 8.0f && q[2] == -12 && q[1] == 1);
}

}  // namespace

int main() {
  test_known_numbers();
  for (const int64_t k : {0, 1, 15, 16, 17, 32, 33, 48, 77, 128, 200}) {
    for (const int64_t m : {0, 1, 4}) {
      for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
        compare(Fp4Activations::fpq, kE2M1, ScaleRule::floor, m, k, dtype);
        compare(Fp4Activations::fpq, kE1M2, ScaleRule::floor, m, k, dtype);
        compare(Fp4Activations::nvfp4, kE2M1, ScaleRule::floor, m, k, dtype);
        for (const ScaleRule rule : {ScaleRule::floor, ScaleRule::rceil, ScaleRule::ceil, ScaleRule::even}) {
          compare(Fp4Activations::mxfp4, kE2M1, rule, m, k, dtype);
        }
      }
    }
  }
  return bitmill_test::failures() != 0;
}
