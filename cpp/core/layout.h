// SPDX-License-Identifier: Apache-2.0
// The packed layouts, bit by bit. Everything stored in a file is stored like this, and everything stored is what runs.
//
// Weight tiles: int32 [ceil(n / 16), ceil(k / v), 16] for b bits a value, v = 32 / b values a word.
//   word [t][w][l] holds row 16 t + l, columns v w ... v w + v - 1, the lowest bits first.
//   b = 1: bit 1 is +1, bit 0 is -1 (or the 1 and 0 of a mask).  b = 4: an FP4 code.  b = 8: a byte.
//   Everything past n or k is 0.
//   A 64-byte vector is the same columns of 16 output rows, so a kernel finishes 16 outputs at once and never
//   reduces across lanes; narrower machines take the 16 lanes in parts.
// Activation rows: int32 [m, ceil(k / 32)], the lowest bits first, everything past k is 0.
//   An operand that can be zero carries a second plane of the same shape: bit 1 where the value is not zero.
// Salient weights (unstructured): three arrays beside the sign tiles (b = 1).
//   mask   tiles like the sign plane; bit 1 where the weight is salient. The sign bit is 0 there.
//   value  one entry a salient weight, row by row, columns ascending: uint8 codes, or float16.
//   start  int32 [n + 1]: the entries of row r are value[start[r]] ... value[start[r + 1] - 1].
// MXFP4 block scales: uint8 [n, ceil(k / 32)], E8M0: byte e is 2^(e - 127), 255 is NaN.
#pragma once

#include <cstdint>

namespace bitmill {

inline constexpr int64_t kTileRows = 16;

// Largest k: every dot product of signs must be exact as a float, so that one rounding happens in the epilogue only.
inline constexpr int64_t kMaxColumns = int64_t{1} << 24;

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t values_per_word(int bits) { return 32 / bits; }
static constexpr int64_t word_count(int64_t k, int bits = 1) { return ceil_div(k, values_per_word(bits)); }
static constexpr int64_t tile_count(int64_t n) { return ceil_div(n, kTileRows); }

}  // namespace bitmill
