// SPDX-License-Identifier: Apache-2.0
// Packing the image, gathering patches, and the choice of the instruction set.
#include "binary_conv.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "binary_conv_planes.h"
#include "binary_matmul.h"
#include "bit_stream.h"
#include "cpu.h"
#include "layout.h"

namespace bitmill {
namespace detail {
namespace {

struct Generic {
  template <Levels levels, class T>
  static void collect(const PixelBlock<T>& block, uint32_t* sign, uint32_t* nonzero) {
    std::fill_n(sign, kPixels, 0u);
    std::fill_n(nonzero, kPixels, 0u);
    for (int64_t channel = 0; channel < block.channels; ++channel) {
      const T* x = block.x + channel * block.plane;
      const float shift = block.shift ? block.shift[channel] : 0.0f;
      for (int64_t i = 0; i < block.pixels; ++i) {
        const float z = to_float(x[i]) + shift;
        const bool bit = levels == Levels::sign ? z > 0 : levels == Levels::plus ? z >= 0 : z > block.threshold;
        sign[i] |= static_cast<uint32_t>(bit) << channel;
        if constexpr (levels == Levels::sign) nonzero[i] |= static_cast<uint32_t>(z > 0 || z < 0) << channel;
      }
    }
  }
};

}  // namespace

int64_t pack_planes_generic(const BinaryConvParams& p, int64_t sample, int64_t group, int64_t y, int32_t* sign,
                            int32_t* nonzero) {
  return pack_planes<Generic>(p, sample, group, y, sign, nonzero);
}

void store_planes_generic(Dtype dtype, const void* in, int64_t rows, int64_t row_width, int64_t first, int64_t count,
                          void* out, int64_t stride) {
  with_dtype(dtype, out, [&]<class T>(T* columns) {
    const T* values = static_cast<const T*>(in) + first;
    for (int64_t column = 0; column < count; ++column) {
      for (int64_t row = 0; row < rows; ++row) columns[column * stride + row] = values[row * row_width + column];
    }
  });
}

namespace {

struct Kernel {
  decltype(&pack_planes_generic) pack_planes;
  decltype(&store_planes_generic) store_planes;
};

Kernel choose_kernel() {
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) return {pack_planes_avx2, store_planes_avx2};
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) return {pack_planes_avx512, store_planes_avx512};
#endif
  return {pack_planes_generic, store_planes_generic};
}

constexpr int64_t kPatches = 64;  // rows of bits and of results that stay in the first-level caches

// The packed image. `nonzero` is null where every position of every patch counts. Where only the padding does not, it
// is one row for all (a stride of 0), and `whole` is the row of a patch without padding.
struct Image {
  std::unique_ptr<int32_t[]> sign, nonzero, whole;
  int64_t row_words = 0, nonzero_stride = 0;
};

std::unique_ptr<int32_t[]> words_for(int64_t count) {
  return std::unique_ptr<int32_t[]>(new int32_t[static_cast<size_t>(count)]);
}

Image pack_image(const BinaryConvParams& p, const Kernel& kernel) {
  const int64_t rows = p.batch * p.groups * p.vertical.size, bits = p.horizontal.size * p.group_channels();
  Image image;
  image.row_words = image.nonzero_stride = word_count(bits);
  const int64_t words = rows * image.row_words + 1;  // BitWriter::copy reads one more
  const bool two_planes = p.levels == Levels::sign;
  image.sign = words_for(words);
  image.sign[words - 1] = 0;
  if (two_planes) {
    image.nonzero = words_for(words);
    image.nonzero[words - 1] = 0;
  }
  std::vector<int64_t> zeros(two_planes ? rows : 0);
  std::vector<float> shift;  // of every pixel of a row
  std::vector<int32_t> count;
  if (p.channels_last) {
    BitpackParams pack;
    pack.x = p.x;
    pack.dtype = p.dtype;
    pack.m = rows;
    pack.k = pack.row_stride = bits;
    if (p.shift) {
      for (int64_t x = 0; x < p.horizontal.size; ++x) shift.insert(shift.end(), p.shift, p.shift + p.channels);
      pack.shift = shift.data();
    }
    pack.threshold = p.threshold;
    pack.levels = p.levels;
    pack.sign = image.sign.get();
    pack.nonzero = image.nonzero.get();
    count.resize(rows);
    pack.count = count.data();
    pack.parallel_for = p.parallel_for;
    bitpack(pack);  // its sizes are checked
    for (size_t row = 0; row < zeros.size(); ++row) zeros[row] = bits - count[row];
  } else {
    split(p.parallel_for, rows, static_cast<double>(bits) * 0.4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t y = row % p.vertical.size, group = row / p.vertical.size % p.groups;
        const int64_t sample = row / (p.vertical.size * p.groups), at = row * image.row_words;
        int32_t* nonzero = two_planes ? image.nonzero.get() + at : nullptr;
        const int64_t absent = kernel.pack_planes(p, sample, group, y, image.sign.get() + at, nonzero);
        if (two_planes) zeros[row] = absent;
      }
    });
  }
  if (p.levels == Levels::bool_ || std::any_of(zeros.begin(), zeros.end(), [](int64_t z) { return z > 0; })) {
    return image;
  }
  image.nonzero = nullptr;
  if (p.vertical.is_padded() || p.horizontal.is_padded()) {  // only the padding is 0: one row serves them all
    image.nonzero = words_for(image.row_words + 1);
    std::fill_n(image.nonzero.get(), image.row_words + 1, -1);
    image.nonzero_stride = 0;
    const int64_t k = p.k(), words = word_count(k);
    image.whole = words_for(words);
    std::fill_n(image.whole.get(), words, -1);
    if (k % 32 != 0) image.whole[words - 1] = static_cast<int32_t>(low_bits(k % 32));
  }
  return image;
}

// The patch of an output position to one row of bits. `rows` are the bits of the sample and group, `stride` words
// apart.
template <class Writer>
void gather(const BinaryConvParams& p, const int32_t* rows, int64_t stride, int64_t out_y, int64_t out_x, int32_t* to) {
  const ConvAxis &v = p.vertical, &h = p.horizontal;
  const int64_t c = p.group_channels(), first = out_x * h.stride - h.before;
  const int64_t run = h.dilation == 1 ? h.kernel : 1;  // pixels side by side
  Writer writer{to};
  for (int64_t ky = 0; ky < v.kernel; ++ky) {
    const int64_t y = out_y * v.stride - v.before + ky * v.dilation;
    if (y < 0 || y >= v.size) {
      writer.skip(h.kernel * c);
      continue;
    }
    for (int64_t kx = 0; kx < h.kernel; kx += run) {
      const int64_t x = first + kx * h.dilation;
      if (x >= 0 && x + run <= h.size) {
        writer.copy(rows + y * stride, x * c, run * c);
        continue;
      }
      const int64_t begin = std::clamp<int64_t>(-x, 0, run), end = std::clamp<int64_t>(h.size - x, begin, run);
      writer.skip(begin * c);
      writer.copy(rows + y * stride, (x + begin) * c, (end - begin) * c);
      writer.skip((run - end) * c);
    }
  }
  writer.finish();
}

// Whether the patch of an output position reaches past the edges of the image.
bool is_at_edge(const BinaryConvParams& p, int64_t out_y, int64_t out_x) {
  const auto reaches = [](const ConvAxis& a, int64_t out) {
    const int64_t first = out * a.stride - a.before;
    return first < 0 || first + a.reach() > a.size;
  };
  return reaches(p.vertical, out_y) || reaches(p.horizontal, out_x);
}

// Whether the rows of bits of the image are the patches already.
bool is_patches(const BinaryConvParams& p) {
  const auto every_pixel = [](const ConvAxis& a) { return a.kernel == 1 && a.stride == 1 && !a.is_padded(); };
  return p.groups == 1 && p.channels % 32 == 0 && every_pixel(p.vertical) && every_pixel(p.horizontal);
}

// Room of one thread: the patches that are gathered, and their outputs.
struct PatchRoom {
  std::unique_ptr<int32_t[]> sign, nonzero;
  std::unique_ptr<char[]> results;
};

// Output positions [first, first + count) of one group.
void convolve(const BinaryConvParams& p, const Image& image, const Kernel& kernel, int64_t group, int64_t first,
              int64_t count, const PatchRoom& room) {
  const int64_t k = p.k(), words = word_count(k), area = p.area(), width = p.horizontal.outputs();
  const bool gathers = !is_patches(p);
  auto* const fill = p.group_channels() % 32 == 0 ? gather<WordWriter> : gather<BitWriter>;
  int64_t sample = first / area, y = first % area / width, x = first % width;
  for (int64_t i = 0; gathers && i < count; ++i) {
    const int64_t row = (sample * p.groups + group) * p.vertical.size;
    fill(p, image.sign.get() + row * image.row_words, image.row_words, y, x, room.sign.get() + i * words);
    if (image.nonzero) {
      int32_t* const to = room.nonzero.get() + i * words;
      if (image.nonzero_stride == 0 && !is_at_edge(p, y, x)) {
        std::copy_n(image.whole.get(), words, to);
      } else {
        fill(p, image.nonzero.get() + row * image.nonzero_stride, image.nonzero_stride, y, x, to);
      }
    }
    if (++x < width) continue;
    x = 0;
    if (++y < p.vertical.outputs()) continue;
    y = 0;
    ++sample;
  }

  // The tiles that hold the group's outputs, which may begin inside the first one.
  const int64_t outputs = p.n / p.groups, tile = group * outputs / kTileRows, skipped = group * outputs % kTileRows;
  const int64_t size = bytes_of(p.dtype), tiles_before = tile * words * kTileRows;
  BinaryMatmulParams product;
  product.a = gathers ? room.sign.get() : image.sign.get() + first * words;
  if (image.nonzero) product.a_nonzero = gathers ? room.nonzero.get() : image.nonzero.get() + first * words;
  product.operand = p.levels == Levels::bool_ ? Operand::bool_ : image.nonzero ? Operand::ternary : Operand::sign;
  product.weight = p.weight + tiles_before;
  product.weight_nonzero = p.weight_nonzero ? p.weight_nonzero + tiles_before : nullptr;
  product.m = count;
  product.n = skipped + outputs;
  product.k = k;
  product.scale = p.scale + tile * kTileRows;
  product.row_scale = p.row_scale ? p.row_scale + first : nullptr;
  product.bias = p.bias ? p.bias + tile * kTileRows : nullptr;
  product.out_dtype = p.dtype;
  char* const out = static_cast<char*>(p.out);
  const bool in_place = p.channels_last;  // one group
  product.out = in_place ? out + first * p.n * size : room.results.get();
  binary_matmul(product);  // its arguments are checked
  if (in_place) return;
  for (int64_t i = 0; i < count;) {  // a sample's positions lie side by side
    const int64_t sample = (first + i) / area, position = (first + i) % area,
                  rows = std::min(count - i, area - position);
    kernel.store_planes(p.dtype, room.results.get() + i * product.n * size, rows, product.n, skipped, outputs,
                        out + ((sample * p.n + group * outputs) * area + position) * size, area);
    i += rows;
  }
}

bool is_valid(const ConvAxis& axis) {
  const auto within = [](int64_t value, int64_t smallest) { return value >= smallest && value <= kMaxColumns; };
  return axis.size >= 0 && within(axis.kernel, 1) && within(axis.stride, 1) && within(axis.before, 0) &&
         within(axis.after, 0) && within(axis.dilation, 1) && axis.outputs() > 0;
}

}  // namespace
}  // namespace detail

Status binary_conv(const BinaryConvParams& p) {
  if (p.batch < 0 || p.channels < 0 || p.n < 0 || !detail::is_valid(p.vertical) || !detail::is_valid(p.horizontal)) {
    return Status::bad_size;
  }
  if (p.groups < 1 || p.channels % p.groups != 0 || p.n % p.groups != 0) return Status::bad_size;
  const int64_t most = kMaxColumns / std::max<int64_t>(p.group_channels(), 1);
  if (p.vertical.kernel * p.horizontal.kernel > most || p.horizontal.size > most) return Status::bad_size;
  if (p.channels_last && p.groups > 1) return Status::bad_argument;
  if (p.batch == 0 || p.n == 0) return Status::ok;
  const detail::Kernel kernel = detail::choose_kernel();
  const detail::Image image = detail::pack_image(p, kernel);
  const int64_t positions = p.positions(), words = word_count(p.k());
  // Chunks of equal size, and whole blocks of the product's kernels: 196 positions are not 3 chunks of 64 and one of 4.
  const int64_t rows = ceil_div(ceil_div(positions, ceil_div(positions, detail::kPatches)), kRowUnit) * kRowUnit;
  const double cost = static_cast<double>(words + 2) * static_cast<double>(p.n * rows) * 0.1;
  split(p.parallel_for, ceil_div(positions, rows), cost, [&](int64_t begin, int64_t end) {
    const int64_t outputs = p.n / p.groups + kTileRows;
    const detail::PatchRoom room{detail::words_for(rows * words),
                                 image.nonzero ? detail::words_for(rows * words) : nullptr,
                                 std::unique_ptr<char[]>(new char[rows * outputs * bytes_of(p.dtype)])};
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * rows, count = std::min(rows, positions - first);
      for (int64_t group = 0; group < p.groups; ++group) {
        detail::convolve(p, image, kernel, group, first, count, room);
      }
    }
  });
  return Status::ok;
}

}  // namespace bitmill
