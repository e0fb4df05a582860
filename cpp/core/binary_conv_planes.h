// SPDX-License-Identifier: Apache-2.0
// One row of pixels to bits, from channels in planes: 16 neighbouring pixels are 16 lanes, which collect one bit a
// channel; the words of a pixel are then joined to the row.
#pragma once

#include "binary_conv.h"
#include "bit_stream.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill::detail {

inline constexpr int64_t kPixels = 16;

// Channels of up to 16 pixels, up to 32 planes of them.
template <class T>
struct PixelBlock {
  const T* x;
  int64_t plane;  // elements from one channel to the next
  int64_t channels, pixels;
  const float* shift;  // of these channels, or null
  float threshold;
};

// Few channels: neighbouring pixels are joined until a word is nearly full, which takes a few vector steps for all.
static inline void put_joined(uint32_t* pixels, int64_t size, BitWriter& writer) {
  int64_t count = kPixels;
  for (; 2 * size <= 32 && count > 1; size *= 2) {
    count /= 2;
    for (int64_t i = 0; i < count; ++i) pixels[i] = pixels[2 * i] | pixels[2 * i + 1] << size;
  }
  for (int64_t i = 0; i < count; ++i) writer.put(pixels[i], size);
}

// Set::collect<levels>(block, sign, nonzero) writes 16 words each; pixels past the end of the row have any value.
template <class Set, Levels levels, class T>
static int64_t pack_planes(const BinaryConvParams& p, const T* x, int64_t sample, int64_t group, int64_t y,
                           int32_t* sign, int32_t* nonzero) {
  const int64_t c = p.group_channels(), width = p.horizontal.size, words = word_count(c);
  const int64_t plane = p.vertical.size * width, first = group * c;
  const T* row = x + (sample * p.channels + first) * plane + y * width;
  const Scratch<uint32_t> blocks(2 * words * kPixels);  // [plane of bits][word][pixel]
  uint32_t* const nonzero_blocks = blocks + words * kPixels;
  BitWriter sign_writer{sign}, nonzero_writer{nonzero};
  int64_t present = 0;
  for (int64_t begin = 0; begin < width; begin += kPixels) {
    const int64_t pixels = width - begin < kPixels ? width - begin : kPixels;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t channels = c - 32 * w < 32 ? c - 32 * w : 32;
      const float* shift = p.shift ? p.shift + first + 32 * w : nullptr;
      const PixelBlock<T> block{row + 32 * w * plane + begin, plane, channels, pixels, shift, p.threshold};
      Set::template collect<levels>(block, blocks + w * kPixels, nonzero_blocks + w * kPixels);
    }
    if (pixels == kPixels && 2 * c <= 32) {
      if constexpr (levels == Levels::sign) {
        for (int64_t i = 0; i < kPixels; ++i) present += __builtin_popcount(nonzero_blocks[i]);
        put_joined(nonzero_blocks, c, nonzero_writer);
      }
      put_joined(blocks, c, sign_writer);
      continue;
    }
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t w = 0; w < words; ++w) {
        const int64_t size = c - 32 * w < 32 ? c - 32 * w : 32;
        sign_writer.put(blocks[w * kPixels + i], size);
        if constexpr (levels == Levels::sign) {
          nonzero_writer.put(nonzero_blocks[w * kPixels + i], size);
          present += __builtin_popcount(nonzero_blocks[w * kPixels + i]);
        }
      }
    }
  }
  sign_writer.finish();
  if constexpr (levels == Levels::sign) nonzero_writer.finish();
  return levels == Levels::sign ? width * c - present : 0;
}

template <class Set>
static int64_t pack_planes(const BinaryConvParams& p, int64_t sample, int64_t group, int64_t y, int32_t* sign,
                           int32_t* nonzero) {
  return with_dtype(p.dtype, p.x, [&](const auto* x) {
    switch (p.levels) {
      case Levels::plus:
        return pack_planes<Set, Levels::plus>(p, x, sample, group, y, sign, nonzero);
      case Levels::bool_:
        return pack_planes<Set, Levels::bool_>(p, x, sample, group, y, sign, nonzero);
      case Levels::sign:
        break;
    }
    return pack_planes<Set, Levels::sign>(p, x, sample, group, y, sign, nonzero);
  });
}

}  // namespace bitmill::detail
