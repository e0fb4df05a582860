// SPDX-License-Identifier: Apache-2.0
// The three floating-point types of activations and their exact conversions to and from float (round to nearest even).
// Functions in headers are static: a copy compiled with wider instructions must never serve another translation unit.
// They are constexpr where kernels on a GPU use them too.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace bitmill {

enum class Dtype { f32, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static constexpr float to_float(float x) { return x; }

static constexpr float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

static constexpr float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  if (magnitude < 0x400u) {  // zero or subnormal: exact as a product
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

static constexpr void store(float x, float* out) { *out = x; }

static constexpr void store(float x, BFloat16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out->bits = nan ? uint16_t{0x7FC0} : static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static constexpr void store(float x, Float16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // rounds past 65504
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum leaves a multiple of 2^-24 in the low mantissa bits
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

static inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Calls f with a pointer of the type that `dtype` names.
template <class F>
auto with_dtype(Dtype dtype, const void* data, F&& f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(static_cast<const BFloat16*>(data));
    case Dtype::f16:
      return f(static_cast<const Float16*>(data));
    case Dtype::f32:
      break;
  }
  return f(static_cast<const float*>(data));
}

template <class F>
auto with_dtype(Dtype dtype, void* data, F&& f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(static_cast<BFloat16*>(data));
    case Dtype::f16:
      return f(static_cast<Float16*>(data));
    case Dtype::f32:
      break;
  }
  return f(static_cast<float*>(data));
}

}  // namespace bitmill
