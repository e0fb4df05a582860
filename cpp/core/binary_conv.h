// SPDX-License-Identifier: Apache-2.0
// A 2-D convolution of bits with bits. The image is packed once (layout.h: images); patches become rows of bits, a few
// at a time, which the kernels of binary_matmul multiply. A padded position is 0, never -1 or +1.
#pragma once

#include <cstdint>

#include "bitpack.h"
#include "floats.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

// One spatial dimension: of the image, of the kernel, and how the one passes over the other.
struct ConvAxis {
  int64_t size = 0, kernel = 1, stride = 1, before = 0, after = 0, dilation = 1;

  int64_t reach() const { return dilation * (kernel - 1) + 1; }
  // Outputs, or less than 1 if the kernel is larger than the padded image.
  int64_t outputs() const {
    const int64_t room = size + before + after - reach();
    return room < 0 ? 0 : room / stride + 1;
  }
  bool is_padded() const { return before > 0 || (outputs() - 1) * stride + reach() - before > size; }
};

struct BinaryConvParams {
  const void* x = nullptr;  // [batch, channels, height, width], or with the channels last in memory
  Dtype dtype = Dtype::f32;
  bool channels_last = false;  // of x and of out; for one group only
  int64_t batch = 0, channels = 0;
  ConvAxis vertical, horizontal;
  int64_t groups = 1;
  const float* shift = nullptr;  // [channels] or null, added to x first
  float threshold = 0.0f;        // for Levels::bool_
  Levels levels = Levels::sign;

  const int32_t* weight = nullptr;          // tiles of n rows of k columns
  const int32_t* weight_nonzero = nullptr;  // the same, or null
  int64_t n = 0;                            // output channels of all groups
  const float* scale = nullptr;             // [n]
  const float* row_scale = nullptr;         // [positions()] or null: scale becomes fl(scale * row_scale)
  const float* bias = nullptr;              // [n] or null
  void* out = nullptr;                      // [batch, n, height, width] of `dtype`: fl(fl(scale * dot) + bias)
  ParallelFor parallel_for = serial_for;

  int64_t group_channels() const { return channels / groups; }
  int64_t k() const { return vertical.kernel * horizontal.kernel * group_channels(); }
  int64_t area() const { return vertical.outputs() * horizontal.outputs(); }
  int64_t positions() const { return batch * area(); }
};
Status binary_conv(const BinaryConvParams& params);

namespace detail {
// One row of pixels, its channels in planes, to one row of bits and, for Levels::sign, of nonzero bits. Answers how
// many values are 0.
int64_t pack_planes_generic(const BinaryConvParams& params, int64_t sample, int64_t group, int64_t y, int32_t* sign,
                            int32_t* nonzero);
int64_t pack_planes_avx2(const BinaryConvParams& params, int64_t sample, int64_t group, int64_t y, int32_t* sign,
                         int32_t* nonzero);
int64_t pack_planes_avx512(const BinaryConvParams& params, int64_t sample, int64_t group, int64_t y, int32_t* sign,
                           int32_t* nonzero);
// Rows [rows, row_width], of which `count` columns from `first` on are wanted, to columns: out[column * stride + row].
void store_planes_generic(Dtype dtype, const void* in, int64_t rows, int64_t row_width, int64_t first, int64_t count,
                          void* out, int64_t stride);
void store_planes_avx2(Dtype dtype, const void* in, int64_t rows, int64_t row_width, int64_t first, int64_t count,
                       void* out, int64_t stride);
void store_planes_avx512(Dtype dtype, const void* in, int64_t rows, int64_t row_width, int64_t first, int64_t count,
                         void* out, int64_t stride);
}  // namespace detail

}  // namespace bitmill
