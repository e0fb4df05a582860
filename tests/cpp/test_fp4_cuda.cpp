// SPDX-License-Identifier: Apache-2.0
// E2M1, E8M0 and E4M3 against the host code of CUDA's own headers, cuda_fp4.h and cuda_fp8.h, bit for bit: every
// bfloat16 and float16, and float32 around every value and middle. They have nearest even and toward zero only.
#include <cstdio>

#if __has_include(<cuda_fp4.h>)

#include <cuda_fp4.h>

#include <bit>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "fp4_definition.h"

namespace {

using namespace bitmill;

constexpr Rounding kRoundings[] = {Rounding::nearest_even, Rounding::toward_zero};

cudaRoundMode mode_of(Rounding rounding) {
  return rounding == Rounding::nearest_even ? cudaRoundNearest : cudaRoundZero;
}

int code_of(float x, Rounding rounding) { return __nv_cvt_float_to_fp4(x, __NV_E2M1, mode_of(rounding)); }
int code_of(BFloat16 x, Rounding rounding) {
  return __nv_cvt_bfloat16raw_to_fp4(__nv_bfloat16_raw{x.bits}, __NV_E2M1, mode_of(rounding));
}
int code_of(Float16 x, Rounding rounding) {
  return __nv_cvt_halfraw_to_fp4(__half_raw{x.bits}, __NV_E2M1, mode_of(rounding));
}

template <class T>
void test_casts(const std::vector<T>& x, Dtype dtype) {
  for (const Rounding rounding : kRoundings) {
    std::vector<uint8_t> packed(x.size() / 2 + 1);
    Fp4CastParams p{.x = x.data(), .dtype = dtype, .m = 1, .k = std::ssize(x), .row_stride = std::ssize(x)};
    p.rounding = rounding;
    p.packed = packed.data();
    CHECK(fp4_cast(p) == Status::ok);
    int wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) wrong += ((packed[i / 2] >> (4 * (i % 2))) & 15) != code_of(x[i], rounding);
    CHECK(wrong == 0);
  }
  std::vector<uint8_t> bytes(x.size());
  for (const bool up : {false, true}) {
    CHECK(e8m0_cast(x.data(), dtype, std::ssize(x), up, bytes.data()) == Status::ok);
    int wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      wrong += bytes[i] != __nv_cvt_float_to_e8m0(to_float(x[i]), __NV_SATFINITE, up ? cudaRoundPosInf : cudaRoundZero);
    }
    CHECK(wrong == 0);
  }
}

std::vector<float> hard_floats() {
  std::vector<float> x;
  const auto around = [&](float point) {
    const uint32_t bits = std::bit_cast<uint32_t>(point);
    for (uint32_t ulp = bits < 64 ? 0 : bits - 64; ulp <= bits + 64; ++ulp) {
      x.push_back(std::bit_cast<float>(ulp));
      x.push_back(-std::bit_cast<float>(ulp));
    }
  };
  const auto& values = bitmill_test::kFormats[0].values;
  for (int i = 0; i < 8; ++i) {
    around(static_cast<float>(values[i]));
    if (i < 7) around(static_cast<float>((values[i] + values[i + 1]) / 2));
  }
  for (int exponent = -149; exponent < 128; ++exponent) around(std::ldexp(1.0f, exponent));
  around(std::numeric_limits<float>::infinity());  // and NaN above it
  return x;
}

float float_of(__half_raw half) { return to_float(Float16{half.x}); }

void test_values() {
  uint8_t packed[8];
  float values[16];
  for (int i = 0; i < 8; ++i) packed[i] = static_cast<uint8_t>(2 * i | (2 * i + 1) << 4);
  CHECK(fp4_uncast(packed, 1, 16, kE2M1, values) == Status::ok);
  for (int code = 0; code < 16; ++code) {
    const float want = float_of(__nv_cvt_fp4_to_halfraw(static_cast<__nv_fp4_storage_t>(code), __NV_E2M1));
    CHECK(std::bit_cast<uint32_t>(values[code]) == std::bit_cast<uint32_t>(want));
  }
  for (int byte = 0; byte < 256; ++byte) {
    const float e4m3 = e4m3_to_float(static_cast<uint8_t>(byte));
    const float want = float_of(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte), __NV_E4M3));
    CHECK(std::isnan(want) ? std::isnan(e4m3) : std::bit_cast<uint32_t>(e4m3) == std::bit_cast<uint32_t>(want));
    const float e8m0 = e8m0_to_float(static_cast<uint8_t>(byte));
    const float power = to_float(BFloat16{__nv_cvt_e8m0_to_bf16raw(static_cast<__nv_fp8_storage_t>(byte)).x});
    CHECK(std::isnan(power) ? std::isnan(e8m0) : e8m0 == power);
  }
  const float pair[2] = {1, 6};  // the first value is in the low nibble
  Fp4CastParams p{.x = pair, .m = 1, .k = 2, .row_stride = 2};
  p.packed = packed;
  CHECK(fp4_cast(p) == Status::ok);
  CHECK(packed[0] == __nv_cvt_float2_to_fp4x2(float2{1, 6}, __NV_E2M1, cudaRoundNearest));
}

}  // namespace

int main() {
  std::vector<BFloat16> bfloats;
  std::vector<Float16> halves;
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    bfloats.push_back({static_cast<uint16_t>(bits)});
    halves.push_back({static_cast<uint16_t>(bits)});
  }
  const std::vector<float> floats = hard_floats();
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    test_casts(bfloats, Dtype::bf16);
    test_casts(halves, Dtype::f16);
    test_casts(floats, Dtype::f32);
    test_values();
  }
  return bitmill_test::failures() != 0;
}

#else

int main() {
  std::puts("skipped: cuda_fp4.h was not found; install CUDA 12.8 or later, or set CUDA_HOME");
  return 0;
}

#endif
