// SPDX-License-Identifier: Apache-2.0
// Rows of floats as 4-bit floats for products of integers: x[i, j] ~ row_scale[i, group of j] q[i, j], q int8.
//   fpq: code = cast(x / (scale 2^-shift[j])),  q = integer(code) 2^(most - shift[j]),  row_scale = scale unit 2^-most
//   mxfp4: blocks of 32 columns: the codes of mxfp4_quantize,  q = 2 e2m1,  row_scale = E8M0 / 2
//   nvfp4: blocks of 16 columns of y = x 2^-e, where 2^e is the smallest power of two >= fl(amax of the row / 2688):
//     s = E4M3(clamp(fl(amax of the block / 6), 2^-6, 448)),  code = E2M1(fl(y fl(1 / s))),  q = 2 e2m1,
//     row_scale = s 2^e / 2
// `most` is the largest shift, 2^E - 1, integer() and unit are those of fp4_integers. E3M0 has no such int8 numbers. A
// NaN makes the scale NaN that it falls under, and so does an infinity in a block; q is 0 for a NaN, and in such a
// block. FPQ saturates.
#pragma once

#include <cstdint>
#include <vector>

#include "nvfp4.h"

namespace bitmill {

enum class Fp4Activations { fpq, mxfp4, nvfp4 };

struct Fp4ActivationsParams {
  const void* x = nullptr;  // [m, k], contiguous
  Dtype dtype = Dtype::f32;
  int64_t m = 0, k = 0;
  Fp4Activations kind = Fp4Activations::fpq;
  Fp4Format format = kE2M1;           // fpq
  float scale = 1.0f;                 // fpq
  const uint8_t* shift = nullptr;     // fpq: [k] or null for 0
  ScaleRule rule = ScaleRule::floor;  // mxfp4
  int8_t* q = nullptr;                // [m, k]
  float* row_scale = nullptr;         // [m, groups]
  ParallelFor parallel_for = serial_for;

  int64_t groups() const {
    return kind == Fp4Activations::fpq ? 1 : ceil_div(k, kind == Fp4Activations::mxfp4 ? kMxBlock : kNvBlock);
  }
};
// bad_argument for E3M0 and for a shift above 2^E - 1.
Status fp4_activations(const Fp4ActivationsParams& params);

namespace detail {

// What a column of FPQ activations is divided with, and how far its integers are shifted to the left.
struct FpqColumns {
  const float* step;    // [k]
  const int32_t* left;  // [k]
  float row_scale;
};

// A block's scale from the bits of its largest magnitude, and what its values are multiplied with before the cast. The
// scale of a block that is not finite is NaN.
struct BlockScale {
  float scale, inverse;
};
static constexpr BlockScale mxfp4_block(uint32_t amax, ScaleRule rule) {
  const uint8_t byte = mxfp4_scale(amax, rule);
  return {e8m0_to_float(byte), std::bit_cast<float>(byte == 255 ? 0u : (254u - byte) << 23)};
}
static constexpr BlockScale nvfp4_block(uint32_t amax) {
  if (amax >= 0x7F800000u) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  const float scale = e4m3_scale(std::bit_cast<float>(amax) / 6.0f);
  return {scale, 1.0f / scale};
}
// 2^e of a row, and 2^-e.
static constexpr BlockScale nvfp4_row(uint32_t amax) {
  const uint8_t byte = e8m0_from_bits(std::bit_cast<uint32_t>(std::bit_cast<float>(amax) / 2688.0f), true);
  return {e8m0_to_float(byte), byte == 254 ? 0x1p-127f : std::bit_cast<float>((254u - byte) << 23)};
}

void fp4_activations_rows_generic(const Fp4ActivationsParams& params, const FpqColumns& columns, int64_t begin,
                                  int64_t end);
void fp4_activations_rows_avx2(const Fp4ActivationsParams& params, const FpqColumns& columns, int64_t begin,
                               int64_t end);
void fp4_activations_rows_avx512(const Fp4ActivationsParams& params, const FpqColumns& columns, int64_t begin,
                                 int64_t end);

// What is found out once for all rows, and the rows of the chosen instruction set.
struct Fp4RowCast {
  std::vector<float> step;
  std::vector<int32_t> left;
  FpqColumns columns{};
  decltype(&fp4_activations_rows_generic) rows = nullptr;
  double nanoseconds = 0.0;  // of an element

  Status prepare(const Fp4ActivationsParams& params);
};

}  // namespace detail
}  // namespace bitmill
