// SPDX-License-Identifier: Apache-2.0
// NVFP4: E2M1 codes, an E4M3 scale for 16 columns and, if there is one, a factor g of the whole tensor. Every step is
// rounded to float:
//   byte = E4M3(clamp(fl(fl(amax / 6) / g), 2^-6, 448)),  s its value,  code = E2M1(fl(x fl(fl(1 / g) / s)))
// and back fl(fl(e2m1 s) g). Packed rows are those of fp4.h; without g, 1 stands for it.
#pragma once

#include "fp4.h"

namespace bitmill {

inline constexpr int64_t kNvBlock = 16;

struct Nvfp4QuantizeParams {
  const void* x = nullptr;  // [m, k], rows `row_stride` elements apart
  Dtype dtype = Dtype::f32;
  int64_t m = 0, k = 0, row_stride = 0;
  const float* global_scale = nullptr;         // one number or null
  Rounding rounding = Rounding::nearest_even;  // of the codes
  RandomStream random = {};                    // of Rounding::stochastic; element i, j is i * k + j
  uint8_t* packed = nullptr;                   // [m, ceil(k / 2)]
  uint8_t* scale = nullptr;                    // [m, ceil(k / 16)]
  ParallelFor parallel_for = serial_for;
};
// A block with a NaN or an infinity has scale 127 (NaN) and codes 0; so have all for a g that is not positive and
// finite, or so small that a reciprocal overflows.
Status nvfp4_quantize(const Nvfp4QuantizeParams& params);
namespace detail {
// Rows [begin, end); without `stochastic` for the other roundings.
void nvfp4_quantize_rows_avx2(const Nvfp4QuantizeParams& params, int64_t begin, int64_t end);
void nvfp4_quantize_rows_stochastic_avx2(const Nvfp4QuantizeParams& params, int64_t begin, int64_t end);
void nvfp4_quantize_rows_avx512(const Nvfp4QuantizeParams& params, int64_t begin, int64_t end);
}  // namespace detail

struct Nvfp4DequantizeParams {
  const uint8_t* packed = nullptr;  // [m, ceil(k / 2)]
  const uint8_t* scale = nullptr;   // [m, ceil(k / 16)]
  int64_t m = 0, k = 0;
  const float* global_scale = nullptr;  // one number or null
  float* values = nullptr;              // [m, k]
  ParallelFor parallel_for = serial_for;
};
Status nvfp4_dequantize(const Nvfp4DequantizeParams& params);
namespace detail {
void nvfp4_dequantize_rows_avx2(const Nvfp4DequantizeParams& params, int64_t begin, int64_t end);
}  // namespace detail

// E4M3 of a value within 2^-6 ... 448, as a float: 3 bits of mantissa, ties to even.
static constexpr float e4m3_rounded(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>((bits + 0x7FFFFu + ((bits >> 20) & 1u)) & 0xFFF00000u);
}

static constexpr float e4m3_scale(float wanted) {
  return e4m3_rounded(wanted < 0x1p-6f ? 0x1p-6f : wanted > 448.0f ? 448.0f : wanted);
}

static constexpr ScaledBlock nvfp4_scaled(uint32_t amax, float global_scale) {
  const float scale = e4m3_scale(std::bit_cast<float>(amax) / 6.0f / global_scale);
  const float inverse = 1.0f / global_scale / scale;
  const bool valid = amax < 0x7F800000u && inverse > 0.0f && inverse < std::numeric_limits<float>::infinity();
  if (!valid) return {127, 0.0f, false};
  return {static_cast<uint8_t>((std::bit_cast<uint32_t>(scale) >> 20) - (120u << 3)), inverse, true};
}

static constexpr float nvfp4_value(uint8_t byte, float e2m1, float global_scale) {
  return e4m3_to_float(byte) * e2m1 * global_scale;
}

}  // namespace bitmill
