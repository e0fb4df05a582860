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
// Images: a row of pixels is a row of bits, int32 [batch, groups, height, ceil(width c / 32)] for c channels a group;
//   bit c x + i is channel i of pixel x. Pixels are not padded to words, so the neighbouring pixels of a patch are one
//   run of bits, and a colour image takes 3 bits a pixel instead of 32. A patch is such runs one after the other, k =
//   kernel height x kernel width x c bits, and so is a row of a convolution's weight, which is tiles of all n outputs.
// Salient weights: three encodings beside the sign tiles (b = 1), whose bit is 0 where a weight is salient. A value is
//   a code of 8 bits, a byte; a code of 4 bits, two to a byte, the first one in the low half; or a float16. The kernels
//   multiply bytes: 4-bit codes are spread to bytes in every call. At 10 % salient weights that adds an eighth to a
//   fifth to the time of one row of activations, and next to nothing to many.
//   Bitmap, for any fraction: mask, tiles like the sign plane, bit 1 where the weight is salient. value: one entry a
//     salient weight, row by row, columns ascending. start, int32 [n + 1]: the entries of row r are value[start[r]] ...
//     value[start[r + 1] - 1]. Codes of 4 bits: [ceil(start[n] / 2)] bytes.
//   List, for few weights and k < 65536: a slice of steps for every tile, as long as the longest of its 16 rows.
//     start, int32 [ceil(n / 16) + 1]: tile t has the steps start[t] ... start[t + 1] - 1. gap, uint8 [steps, 16] and
//     value [steps, 16]: what step s holds for row 16 t + l is gap[s][l], value[s][l]. A gap g < 255 is an entry g + 1
//     columns after the row's previous one (the first counts from -1); 255 goes on by 255 columns and holds none,
//     which serves distances above 255 and rows that have ended; its value is 0. Codes of 4 bits: [steps, 8] bytes.
//   Columns, where whole columns are salient: column, int32 [c], ascending. value, tiles of b = 4, 8 or 16 bits of the
//     c columns, [ceil(n / 16), ceil(c / v), 16].
//   With codes of 8 bits a list takes 2 bytes a step and row, 1.05 to 1.2 steps an entry; a bitmap 1/8 byte a weight
//   and 1 an entry. The list is the smaller one up to 11 % salient weights. One row of activations is multiplied faster
//   from a list up to 25 % (float activations) or 6 % (int8). The packer takes the smaller, for int8 rather the faster.
// Zoned weights (BiLLM, ARB-LLM): in every block of columns some are salient, for all rows; the others lie in the
//   concentrated or the sparse zone of their row. salient, int32 [ceil(k / 32)]: a row of bits, 1 for a salient column.
//   sign and zone, tiles of b = 1: the columns of a block stand in another order, the salient ones first, each part
//     ascending, so that bits of one meaning are neighbours. sign: the first sign. zone: 1 sparse, 0
//     concentrated; for a salient column its second sign.
//   salient_zone, tiles of b = 1, only if salient columns are split into the two zones too: the zones of each block's
//     salient columns, which begin at the next multiple of 8.
//   scale, float16 or float32 [ceil(n / 16), blocks, s, 16], s scales of 16 rows: for the zones concentrated, sparse,
//     and salient (or its two parts) mu, if there are means, alpha, and for salient ones beta of the second sign.
//   column_scale, [k] of the same type, in the layer's order of columns, or none.
// MXFP4 block scales: uint8 [n, ceil(k / 32)], E8M0: byte e is 2^(e - 127), 255 is NaN.
#pragma once

#include <cstdint>

namespace bitmill {

inline constexpr int64_t kTileRows = 16;

// The gap of a list that holds no entry.
inline constexpr uint8_t kNoEntry = 255;

// Largest k: every dot product of signs must be exact as a float, so that one rounding happens in the epilogue only.
inline constexpr int64_t kMaxColumns = int64_t{1} << 24;

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t values_per_word(int bits) { return 32 / bits; }
static constexpr int64_t word_count(int64_t k, int bits = 1) { return ceil_div(k, values_per_word(bits)); }
static constexpr int64_t tile_count(int64_t n) { return ceil_div(n, kTileRows); }

// What is added to a product [m, n] before its bias: float32 [tiles, rows, 16], 16 outputs of a row side by side, tiles
// from `first` on. What lies past n does not matter.
struct Addend {
  const float* data = nullptr;  // or nothing is added
  int64_t rows = 0, first = 0;

  explicit operator bool() const { return data != nullptr; }
  const float* at(int64_t row, int64_t tile) const { return data + ((tile - first) * rows + row) * kTileRows; }
  Addend from(int64_t row) const { return {data ? data + row * kTileRows : nullptr, rows, first}; }
};

}  // namespace bitmill
