// SPDX-License-Identifier: Apache-2.0
// The partially binarised weight: signs with a scale and a mean for most weights, and salient ones that keep 8 bits or
// a float16, in one of three encodings (layout.h). Its product with activations, and its dense form.
//   w[r, c] = salient(r, c) ? value : mu[r, g(c)] + alpha[r, g(c)] b[r, c],   b = -1, +1
//   value = value_scale[r] (code - value_zero[r]) of a code of 8 or 4 bits, or the float16 itself
// No sign bit is looked up twice: the sign plane is multiplied as if salient weights were b = -1 (their bit is 0), and
// the salient part, which is computed first and added to that product, puts it right:
//   y = sum_g [ alpha_g S_g + mu_g X_g ] + sum_{salient c} x_c (value - (mu_g(c) - alpha_g(c)))
// with S_g = sum of +-x over the sign bits of group g and X_g = sum of x over its columns (one for all outputs).
#pragma once

#include <cstdint>

#include "floats.h"
#include "layout.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

enum class SalientEncoding { bitmap, list, columns };

struct SalientWeight {
  const int32_t* sign = nullptr;  // tiles; bit 0 where the weight is salient
  SalientEncoding encoding = SalientEncoding::bitmap;
  const int32_t* mask = nullptr;       // bitmap: tiles; bits past n or k are ignored
  const uint8_t* gap = nullptr;        // list: [entries, 16]
  const int32_t* column = nullptr;     // columns: [entries]
  const void* value = nullptr;         // codes with value_scale and value_zero, float16 without
  const int32_t* start = nullptr;      // bitmap: [n + 1]; list: [tiles + 1]; columns: null
  const float* value_scale = nullptr;  // [n] or null
  const float* value_zero = nullptr;   // [n] or null
  const float* alpha = nullptr;        // [n, groups]
  const float* mu = nullptr;           // [n, groups] or null: 0
  int64_t n = 0, k = 0;
  int code_bits = 8;       // of a code: 8, or 4
  int64_t entries = 0;     // bitmap: values that there is room for; list: steps of all tiles; columns: columns
  int64_t group_size = 0;  // columns that share alpha and mu, a multiple of 32; 0: one group
};

struct SalientMatmulParams {
  SalientWeight weight;
  const void* x = nullptr;  // [m, k], contiguous
  Dtype dtype = Dtype::f32;
  bool int8 = false;  // round every row of x to int8 first (int8.h)
  int64_t m = 0;
  const float* bias = nullptr;  // [n] or null
  void* out = nullptr;          // [m, n] of `dtype`
  ParallelFor parallel_for = serial_for;
};
// Looks at `start` and `column`, not at every bit: contradictory bits give a wrong result, never a read outside the
// arrays. Without rows the whole check is made.
Status salient_matmul(const SalientMatmulParams& params);

// The dense weight, float32 [n, k]. Checks everything.
Status salient_dequantize(const SalientWeight& weight, float* dense, ParallelFor parallel_for);

// Status::corrupt unless `start` rises from 0 to the number of entries, columns rise and lie below k, every row of a
// mask has as many bits as `start` gives it entries, and no salient weight has a sign bit.
Status salient_check(const SalientWeight& weight, ParallelFor parallel_for);

namespace detail {

// All of the product but the sign plane's part: out = row_scale (sum_g mu_g X_g + salient part).
struct SalientTask {
  const SalientWeight& weight;
  int64_t m, groups, group_width;
  const float* x;          // [m, k]; for int8 the rounded activations as floats, or null where `q` is what is read
  const int8_t* q;         // [m, k] or null
  const float* row_scale;  // [m] or null: 1
  const int32_t* total;    // [m] or null: sums of rows of q
  float* out;              // [tiles, m, 16], whole tiles (Addend in layout.h), from this one on:
  int64_t first;

  float* at(int64_t row, int64_t tile) const { return out + ((tile - first) * m + row) * kTileRows; }
};

// Tiles [begin, end), all rows. The forms for int8 (AVX2's, and VNNI) take int8 activations, uint8 codes, one group, k
// <= kMaxInt8Columns.
inline constexpr int64_t kMaxInt8Columns = int64_t{1} << 16;  // 255 x 127 each stay within int32
inline constexpr int64_t kMaxListColumns = (int64_t{1} << 16) - 1;
void salient_tiles_generic(const SalientTask& task, int64_t begin, int64_t end);
void salient_tiles_avx512(const SalientTask& task, int64_t begin, int64_t end);
void salient_tiles_avx512vnni(const SalientTask& task, int64_t begin, int64_t end);
void salient_tiles_avx2(const SalientTask& task, int64_t begin, int64_t end);
void salient_tiles_int8_avx2(const SalientTask& task, int64_t begin, int64_t end);
// `count` values of `dtype` to float32.
void widen_avx2(Dtype dtype, const void* x, int64_t count, float* out);
void widen_avx512(Dtype dtype, const void* x, int64_t count, float* out);

}  // namespace detail
}  // namespace bitmill
