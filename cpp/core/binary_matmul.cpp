// SPDX-License-Identifier: Apache-2.0
// The obvious form of the binary products, and the choice of the instruction set.
// With s the sign bits, z the nonzero bits and pc the number of set bits, over the true k columns:
//   sign    . weight:  k - 2 pc(s ^ w)           a zero pad on both sides adds nothing
//   ternary . weight:  pc(z) - 2 pc((s ^ w) & z)
//   bool    . weight:  2 pc(s & w) - pc(s)
// and a weight with zeros replaces z by z & its own nonzero bits.
#include "binary_matmul.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "bit_output.h"
#include "cpu.h"
#include "layout.h"
#include "panel_matmul.h"
#include "zero_weights.h"

namespace bitmill {
namespace detail {
namespace {

// The dot product over words [begin, end) of one row with one lane of a tile.
int32_t dot_words(const BinaryMatmulParams& p, const int32_t* a, const int32_t* nonzero, const int32_t* weight,
                  const int32_t* weight_nonzero, int64_t begin, int64_t end) {
  int32_t present = 0, opposite = 0;
  for (int64_t w = begin; w < end; ++w) {
    const int64_t columns = p.k - 32 * w;
    uint32_t mask = columns >= 32 ? ~0u : (1u << columns) - 1;
    if (weight_nonzero) mask &= static_cast<uint32_t>(weight_nonzero[w * kTileRows]);
    const uint32_t s = static_cast<uint32_t>(a[w]), b = static_cast<uint32_t>(weight[w * kTileRows]);
    if (p.operand == Operand::bool_) {
      mask &= s;
      opposite += std::popcount(mask & ~b);
    } else {
      if (p.operand == Operand::ternary) mask &= static_cast<uint32_t>(nonzero[w]);
      opposite += std::popcount((s ^ b) & mask);
    }
    present += std::popcount(mask);
  }
  return present - 2 * opposite;
}

// Dot products of `count` outputs of a row and a tile to integers, bits, or floats of one group.
void finish_dots(const BinaryMatmulParams& p, int64_t row, int64_t tile, const int32_t* dot, int64_t count) {
  const int64_t first = tile * kTileRows;
  if (p.dot) std::copy_n(dot, count, p.dot + row * p.n + first);
  if (p.bits.sign) store_bits(p.bits, p.n, row, tile, dot, count, inside_range);
  if (p.dot || p.bits.sign) return;
  with_dtype(p.out_dtype, p.out, [&](auto* out) {
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t column = first + lane;
      float scale = p.scale[column];
      if (p.row_scale) scale *= p.row_scale[row];
      float value = scale * static_cast<float>(dot[lane]);
      if (p.bias) value += p.bias[column];
      if (p.residual) value += p.residual[row * p.n + column];
      store(value, out + row * p.n + column);
    }
  });
}

}  // namespace

void binary_matmul_tiles_generic(const BinaryMatmulParams& p, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  const int64_t group_words = p.group_size > 0 ? p.group_size / 32 : words;
  const int64_t groups = p.k == 0 ? 0 : p.group_size > 0 ? ceil_div(p.k, p.group_size) : 1;
  for (int64_t row = 0; row < p.m; ++row) {
    const int32_t* a = p.a + row * words;
    const int32_t* nonzero = p.operand == Operand::ternary ? p.a_nonzero + row * words : nullptr;
    const auto dot_of = [&](int64_t column, int64_t from, int64_t to) {
      const int64_t lane = (column / kTileRows) * words * kTileRows + column % kTileRows;
      const int32_t* weight_nonzero = p.weight_nonzero ? p.weight_nonzero + lane : nullptr;
      return dot_words(p, a, nonzero, p.weight + lane, weight_nonzero, from, to);
    };
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileRows, count = std::min(kTileRows, p.n - first);
      if (p.dot || p.bits.sign || groups == 1) {
        int32_t dot[kTileRows];
        for (int64_t lane = 0; lane < count; ++lane) dot[lane] = dot_of(first + lane, 0, words);
        finish_dots(p, row, tile, dot, count);
        continue;
      }
      for (int64_t column = first; column < first + count; ++column) {
        float value = 0.0f;
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t from = group * group_words, to = std::min(words, from + group_words);
          float scale = p.scale[column * groups + group];
          if (p.row_scale) scale *= p.row_scale[row];
          const float term = scale * static_cast<float>(dot_of(column, from, to));
          value = group == 0 ? term : value + term;
        }
        if (p.bias) value += p.bias[column];
        if (p.residual) value += p.residual[row * p.n + column];
        with_dtype(p.out_dtype, p.out, [&](auto* out) { store(value, out + row * p.n + column); });
      }
    }
  }
}

namespace {

using Tiles = void (*)(const BinaryMatmulParams&, int64_t, int64_t);

// Tiles with zeros, one group: from two products to integers.
void multiply_twice(const BinaryMatmulParams& p, Tiles tiles, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k), count = end - begin;
  const TwoWeights weights(p.weight, p.weight_nonzero, p.k, begin, count);
  BinaryMatmulParams part;
  part.operand = p.operand;
  part.n = std::min(count * kTileRows, p.n - begin * kTileRows);
  part.k = p.k;
  std::vector<int32_t> first(static_cast<size_t>(std::min(p.m, kZeroRows) * part.n)), second(first.size());
  for (int64_t row = 0; row < p.m; row += kZeroRows) {
    part.m = std::min(kZeroRows, p.m - row);
    part.a = p.a + row * words;
    part.a_nonzero = p.a_nonzero ? p.a_nonzero + row * words : nullptr;
    part.weight = weights.lower.data(), part.dot = first.data();
    tiles(part, 0, count);
    part.weight = weights.upper.data(), part.dot = second.data();
    tiles(part, 0, count);
    for (int64_t r = 0; r < part.m; ++r) {
      for (int64_t tile = 0; tile < count; ++tile) {
        int32_t dot[kTileRows];
        const int64_t at = r * part.n + tile * kTileRows, lanes = std::min(kTileRows, part.n - tile * kTileRows);
        for (int64_t lane = 0; lane < lanes; ++lane) dot[lane] = (first[at + lane] + second[at + lane]) / 2;
        finish_dots(p, row + r, begin + tile, dot, lanes);
      }
    }
  }
}

void multiply_tiles(const BinaryMatmulParams& p, Tiles tiles, int64_t begin, int64_t end) {
  const bool grouped = p.group_size > 0 && p.group_size < p.k && !p.dot && !p.bits.sign;
  BinaryMatmulParams whole = p;
  whole.weight_nonzero = nullptr;
  for_zero_weights(
      p.weight_nonzero, p.n, p.k, begin, end, [&](int64_t first, int64_t last) { tiles(whole, first, last); },
      [&](int64_t first, int64_t last) {
        grouped ? binary_matmul_tiles_generic(p, first, last) : multiply_twice(p, tiles, first, last);
      });
}

struct Kernel {
  Tiles tiles;
  double nanoseconds_per_word;  // of one row and one output
};

Kernel choose_kernel() {
  switch (selected()) {
#ifdef BITMILL_NEON
    case InstructionSet::neon:
      return {binary_matmul_tiles_neon, 0.2};
#endif
#ifdef BITMILL_AVX2
    case InstructionSet::avx2:
      return {binary_matmul_tiles_avx2, 0.08};
#endif
#ifdef BITMILL_AVX512
    case InstructionSet::avx512:
      return {binary_matmul_tiles_avx512, 0.03};
#endif
    default:
      return {binary_matmul_tiles_generic, 1.0};
  }
}

struct WeightKernel {
  void (*tiles)(const BinaryWeightMatmulParams&, int64_t, int64_t);
  double nanoseconds_per_column;  // of one row and one output
};

WeightKernel choose_weight_kernel([[maybe_unused]] int64_t k) {
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes() && k > 0) return {binary_weight_matmul_tiles_avx2, 0.015};
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512 && k > 0) {
    return {binary_weight_matmul_tiles_avx512, 0.01};
  }
#endif
  return {binary_weight_matmul_tiles_generic, 0.3};
}

}  // namespace

void binary_weight_matmul_tiles_generic(const BinaryWeightMatmulParams& p, int64_t begin, int64_t end) {
  const PanelShape shape{p.m, p.n, p.k, p.group_size};
  const int64_t words = word_count(p.k), groups = shape.groups();
  const auto decode = [&](int64_t tile, int64_t first, int64_t last, float* panel) {
    for (int64_t j = first; j < last; ++j) {
      const int64_t word = (tile * words + j / 32) * kTileRows;
      for (int64_t lane = 0; lane < kTileRows; ++lane) {
        const auto bit = [&](const int32_t* tiles) {
          return (static_cast<uint32_t>(tiles[word + lane]) >> (j % 32)) & 1u;
        };
        const float sign = bit(p.weight) ? 1.0f : -1.0f;
        panel[(j - first) * kTileRows + lane] = !p.weight_nonzero || bit(p.weight_nonzero) ? sign : 0.0f;
      }
    }
  };
  const auto finish = [&](int64_t, int64_t tile, int64_t lane, int64_t group, float sum, float& value) {
    value += p.scale[(tile * kTileRows + lane) * groups + group] * sum;
  };
  const auto done = [&](int64_t row, int64_t tile, int64_t lane, float value) {
    if (p.addend) value += p.addend.at(row, tile)[lane];
    return p.bias ? value + p.bias[tile * kTileRows + lane] : value;
  };
  with_dtype(p.dtype, p.out, [&]<class T>(T* out) {
    panel_tiles(shape, static_cast<const T*>(p.x), out, begin, end, decode, finish, done);
  });
}

// Floats would not be exact as the mean of two sums, so tiles with zeros take the generic form.
void binary_weight_matmul_tiles(const BinaryWeightMatmulParams& p, int64_t begin, int64_t end) {
  const auto tiles = choose_weight_kernel(p.k).tiles;
  BinaryWeightMatmulParams whole = p;
  whole.weight_nonzero = nullptr;
  for_zero_weights(
      p.weight_nonzero, p.n, p.k, begin, end, [&](int64_t first, int64_t last) { tiles(whole, first, last); },
      [&](int64_t first, int64_t last) { binary_weight_matmul_tiles_generic(p, first, last); });
}

}  // namespace detail

Status check(const BinaryMatmulParams& p) {
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.group_size < 0 || p.group_size % 32 != 0) return Status::bad_argument;
  if (p.m == 0 || p.n == 0) return Status::ok;  // an array without elements may be null, here and below
  if (p.k > 0 && (p.operand == Operand::ternary) != (p.a_nonzero != nullptr)) return Status::bad_argument;
  if (p.bits.sign && (p.dot || !p.bits.positive || (p.bits.nonzero == nullptr) != (p.bits.negative == nullptr) ||
                      (p.bits.single && !p.bits.nonzero))) {
    return Status::bad_argument;
  }
  if (p.residual && (p.dot || p.bits.sign || p.out_dtype != Dtype::f32)) return Status::bad_argument;
  if (!p.dot && !p.bits.sign && (!p.out || (p.k > 0 && !p.scale))) return Status::bad_argument;
  return Status::ok;
}

namespace {

BinaryWeightMatmulParams rows_of(BinaryWeightMatmulParams p, int64_t begin, int64_t end) {
  p.m = end - begin;
  p.x = static_cast<const char*>(p.x) + begin * p.k * bytes_of(p.dtype);
  p.addend = p.addend.from(begin);
  p.out = static_cast<char*>(p.out) + begin * p.n * bytes_of(p.dtype);
  return p;
}

}  // namespace

BinaryMatmulParams rows_of(BinaryMatmulParams p, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k), bits = begin * word_count(p.n);
  p.m = end - begin;
  p.a += begin * words;
  if (p.a_nonzero) p.a_nonzero += begin * words;
  if (p.row_scale) p.row_scale += begin;
  if (p.residual) p.residual += begin * p.n;
  if (p.dot) p.dot += begin * p.n;
  if (p.bits.sign) p.bits.sign += bits;
  if (p.bits.nonzero) p.bits.nonzero += bits;
  if (p.out) p.out = static_cast<char*>(p.out) + begin * p.n * bytes_of(p.out_dtype);
  return p;
}

double nanoseconds_per_row(const BinaryMatmulParams& p) {
  const double nanoseconds_per_word = detail::choose_kernel().nanoseconds_per_word;
  return static_cast<double>(p.n * (word_count(p.k) + 2)) * nanoseconds_per_word;
}

Status binary_matmul(const BinaryMatmulParams& p) {
  const Status status = check(p);
  if (status != Status::ok || p.m == 0 || p.n == 0) return status;
  auto* tiles = detail::choose_kernel().tiles;
  const double cost = nanoseconds_per_row(p) / static_cast<double>(p.n);
  split_product(p.parallel_for, p.m, p.n, cost, [&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
    detail::multiply_tiles(rows_of(p, row, rows), tiles, begin, end);
  });
  return Status::ok;
}

Status binary_weight_matmul(const BinaryWeightMatmulParams& p) {
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.group_size < 0 || p.group_size % 32 != 0) return Status::bad_argument;
  const double cost = static_cast<double>(p.k) * detail::choose_weight_kernel(p.k).nanoseconds_per_column;
  split_product(p.parallel_for, p.m, p.n, cost, [&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
    detail::binary_weight_matmul_tiles(rows_of(p, row, rows), begin, end);
  });
  return Status::ok;
}

}  // namespace bitmill
