// SPDX-License-Identifier: Apache-2.0
// The binary convolution against sums of single products, on every instruction set this machine has and with the work
// split in parts, with buffers of exactly the needed size.
#include <cmath>
#include <random>
#include <vector>

#include "binary_conv.h"
#include "bitpack.h"
#include "check.h"
#include "cpu.h"
#include "layout.h"
#include "threads.h"

using namespace bitmill;
using bitmill_test::scattered_for;

namespace {

std::mt19937 random_bits(3);

std::vector<float> random_floats(int64_t count, bool zeros) {
  std::vector<float> values(count);
  for (float& value : values) {
    value = static_cast<float>(static_cast<int32_t>(random_bits())) / 2e9f;
    if (zeros && random_bits() % 5 == 0) value = 0.0f;
  }
  return values;
}

int level_of(float z, Levels levels, float threshold) {
  if (levels == Levels::sign) return (z > 0) - (z < 0);
  if (levels == Levels::plus) return z >= 0 ? 1 : -1;
  return z > threshold;
}

struct Problem {
  int64_t batch, channels, n, groups;
  ConvAxis vertical, horizontal;
  bool x_zeros = true, weight_zeros = false, options = true;
};

void convolves(const Problem& problem) {
  const auto& [batch, channels, n, groups, v, h, x_zeros, weight_zeros, options] = problem;
  const int64_t c = channels / groups, k = v.kernel * h.kernel * c, height = v.outputs(), width = h.outputs();
  const std::vector<float> x = random_floats(batch * channels * v.size * h.size, x_zeros);
  const std::vector<float> shift = random_floats(channels, true), scale = random_floats(n, false);
  const std::vector<float> bias = random_floats(n, false), row_scale = random_floats(batch * height * width, false);
  std::vector<int> w(n * k);
  std::vector<uint8_t> sign(n * k), nonzero(n * k);
  for (int64_t i = 0; i < n * k; ++i) {
    const uint32_t bits = random_bits();
    w[i] = weight_zeros && bits % 5 == 0 ? 0 : bits & 256 ? 1 : -1;
    sign[i] = w[i] > 0;
    nonzero[i] = w[i] != 0;
  }
  std::vector<int32_t> tiles(tile_count(n) * word_count(k) * kTileRows), nonzero_tiles(tiles.size());
  CHECK(tile_pack(sign.data(), n, k, 1, tiles.data()) == Status::ok);
  CHECK(tile_pack(nonzero.data(), n, k, 1, nonzero_tiles.data()) == Status::ok);

  BinaryConvParams p;
  p.batch = batch;
  p.channels = channels;
  p.vertical = v;
  p.horizontal = h;
  p.groups = groups;
  p.shift = options ? shift.data() : nullptr;
  p.threshold = 0.3f;
  p.weight = tiles.data();
  p.weight_nonzero = weight_zeros ? nonzero_tiles.data() : nullptr;
  p.n = n;
  p.scale = scale.data();
  p.row_scale = options ? row_scale.data() : nullptr;
  p.bias = options ? bias.data() : nullptr;
  for (const Levels levels : {Levels::sign, Levels::plus, Levels::bool_}) {
    p.levels = levels;
    std::vector<float> want(batch * n * height * width);
    for (int64_t i = 0; i < static_cast<int64_t>(want.size()); ++i) {
      const int64_t out_x = i % width, out_y = i / width % height, o = i / (width * height) % n;
      const int64_t sample = i / (width * height * n), first = o / (n / groups) * c;
      int dot = 0;
      for (int64_t column = 0; column < k; ++column) {
        const int64_t channel = first + column % c, kx = column / c % h.kernel, ky = column / c / h.kernel;
        const int64_t at_x = out_x * h.stride - h.before + kx * h.dilation;
        const int64_t at_y = out_y * v.stride - v.before + ky * v.dilation;
        if (at_x < 0 || at_x >= h.size || at_y < 0 || at_y >= v.size) continue;
        const float value = x[((sample * channels + channel) * v.size + at_y) * h.size + at_x];
        dot += level_of(options ? value + shift[channel] : value, levels, p.threshold) * w[o * k + column];
      }
      const int64_t position = (sample * height + out_y) * width + out_x;
      const float factor = options ? scale[o] * row_scale[position] : scale[o];
      want[i] = factor * static_cast<float>(dot);
      if (options) want[i] += bias[o];
    }
    for (const InstructionSet set : kInstructionSets) {
      if (!select(set)) continue;
      for (const ParallelFor parallel : {serial_for, scattered_for}) {
        p.parallel_for = parallel;
        p.x = x.data();
        p.dtype = Dtype::f32;
        p.channels_last = false;
        std::vector<float> got(want.size(), NAN);
        p.out = got.data();
        CHECK(binary_conv(p) == Status::ok && got == want);
        if (groups > 1) continue;
        std::vector<float> last(x.size()), got_last(want.size(), NAN);
        for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
          const int64_t area = v.size * h.size, pixel = i / (area * channels) * area + i % area;
          last[pixel * channels + i / area % channels] = x[i];
        }
        p.x = last.data();
        p.channels_last = true;
        p.out = got_last.data();
        CHECK(binary_conv(p) == Status::ok);
        for (int64_t i = 0; i < static_cast<int64_t>(want.size()); ++i) {
          const int64_t area = height * width, pixel = i / (area * n) * area + i % area;
          CHECK(got_last[pixel * n + i / area % n] == want[i]);
        }
      }
      // Halves: the rounding of the same floats.
      std::vector<BFloat16> halves(x.size()), got(want.size());
      std::vector<float> rounded(x.size()), exact(want.size());
      for (size_t i = 0; i < x.size(); ++i) {
        store(x[i], &halves[i]);
        rounded[i] = to_float(halves[i]);
      }
      p.channels_last = false;
      p.x = rounded.data();
      p.out = exact.data();
      CHECK(binary_conv(p) == Status::ok);
      p.x = halves.data();
      p.dtype = Dtype::bf16;
      p.out = got.data();
      CHECK(binary_conv(p) == Status::ok);
      for (size_t i = 0; i < exact.size(); ++i) {
        BFloat16 wanted;
        store(exact[i], &wanted);
        CHECK(got[i].bits == wanted.bits);
      }
    }
  }
  select(best());
}

}  // namespace

int main() {
  // size, kernel, stride, before, after, dilation
  const ConvAxis axes[] = {{6, 3, 1, 1, 1, 1}, {7, 3, 2, 0, 1, 1},  {16, 4, 4, 0, 0, 1}, {9, 2, 1, 2, 0, 3},
                           {1, 1, 1, 0, 0, 1}, {20, 5, 3, 4, 4, 2}, {2, 3, 1, 3, 3, 1}};
  for (const ConvAxis& v : axes) {
    for (const ConvAxis& h : axes) {
      convolves({2, 3, 5, 1, v, h});
    }
  }
  const ConvAxis square{6, 3, 1, 1, 1, 1}, open{7, 3, 2, 0, 0, 1}, wide{37, 3, 1, 1, 1, 1};
  for (const int64_t channels : {1, 2, 31, 32, 33, 64, 96, 100}) {
    for (const int64_t n : {1, 16, 17, 40}) {
      convolves({1, channels, n, 1, square, open, true, n % 2 == 1, n > 16});
      convolves({3, channels, n, 1, open, square, false, n % 2 == 0, n < 17});
    }
    convolves({1, 2 * channels, 6, 2, square, wide});
    convolves({2, channels, channels, channels, open, square});
    convolves({2, channels, 3 * channels, channels, square, open});
  }
  const ConvAxis pixels{9, 1, 1, 0, 0, 1}, padded{9, 1, 1, 1, 0, 1}, apart{9, 1, 2, 0, 0, 1};
  for (const int64_t channels : {32, 64, 40}) {  // whole words are patches already
    for (const bool zeros : {false, true}) {
      convolves({2, channels, 20, 1, pixels, pixels, zeros});
      convolves({2, channels, 20, 1, pixels, padded, zeros});
      convolves({2, channels, 20, 1, apart, pixels, zeros});
    }
  }
  convolves({0, 3, 5, 1, square, square});
  convolves({2, 3, 0, 1, square, square});

  BinaryConvParams p;
  CHECK(binary_conv(p) == Status::bad_size);  // a kernel larger than the image
  p.vertical = p.horizontal = square;
  p.channels = 3;
  p.n = 4;
  p.groups = 2;
  CHECK(binary_conv(p) == Status::bad_size);  // channels that do not divide
  p.channels = 4;
  p.channels_last = true;
  CHECK(binary_conv(p) == Status::bad_argument);
  p.channels_last = false;
  p.horizontal.stride = 0;
  CHECK(binary_conv(p) == Status::bad_size);
  p.horizontal = square;
  p.channels = 2 * kMaxColumns;
  CHECK(binary_conv(p) == Status::bad_size);
  return bitmill_test::failures() != 0;
}
