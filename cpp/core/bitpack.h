// SPDX-License-Identifier: Apache-2.0
// Rows of floats to rows of bits and back, and codes to weight tiles and back (layout.h).
#pragma once

#include <cstdint>

#include "floats.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

// What a float z = x + shift becomes. NaN counts as 0 for `sign` (as torch.sign), and as "not above" for the others.
enum class Levels {
  sign,  // -1, 0, +1: sign bit [z > 0], nonzero bit [z != 0]
  plus,  // -1, +1: sign bit [z >= 0]
  bool_  // 0, 1: bit [z > threshold]
};

struct BitpackParams {
  const void* x = nullptr;  // [m, k], rows `row_stride` elements apart
  Dtype dtype = Dtype::f32;
  int64_t m = 0, k = 0, row_stride = 0;
  const float* shift = nullptr;  // [k] or null
  float threshold = 0.0f;        // for Levels::bool_
  Levels levels = Levels::sign;
  int32_t* sign = nullptr;     // [m, word_count(k)]
  int32_t* nonzero = nullptr;  // the same, for Levels::sign; otherwise null
  int32_t* count = nullptr;    // [m] or null: set bits of `nonzero` (Levels::sign) or of `sign`
  float* mean = nullptr;       // [m] or null: mean |x + shift|, see mean_abs
  ParallelFor parallel_for = serial_for;
};
Status bitpack(const BitpackParams& params);
BitpackParams rows_of(BitpackParams params, int64_t begin, int64_t end);
double nanoseconds_per_row(const BitpackParams& params);

// Signs (and nonzero bits, or null) of [m, k] to int8 -1, 0, +1.
Status bitunpack(const int32_t* sign, const int32_t* nonzero, int64_t m, int64_t k, int8_t* values);

// Codes [n, k] of 1, 4 or 8 bits, one a byte, to weight tiles and back.
Status tile_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, int32_t* tiles);
Status tile_unpack(const int32_t* tiles, int64_t n, int64_t k, int bits, uint8_t* codes);

// fl(sum / k) of magnitudes z[0..k), with one order of summation for every instruction set: pad with zeros to a power
// of two, then add the upper half onto the lower until one is left. Overwrites z, which has room for bit_ceil(k).
float mean_by_halves(float* z, int64_t k);

namespace detail {
void bitpack_rows_generic(const BitpackParams& params, int64_t begin, int64_t end);
void bitpack_rows_neon(const BitpackParams& params, int64_t begin, int64_t end);
void bitpack_rows_avx2(const BitpackParams& params, int64_t begin, int64_t end);
void bitpack_rows_avx512(const BitpackParams& params, int64_t begin, int64_t end);
}  // namespace detail

}  // namespace bitmill
