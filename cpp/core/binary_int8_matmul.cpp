// SPDX-License-Identifier: Apache-2.0
// The obvious form of the product of int8 activations with bits, and the choice of the instruction set.
#include "binary_int8_matmul.h"

#include <algorithm>

#include "cpu.h"
#include "layout.h"

namespace bitmill {
namespace detail {

void binary_int8_matmul_tiles_generic(const BinaryInt8MatmulParams& p, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  const int64_t width = p.group_size > 0 ? p.group_size : std::max<int64_t>(p.k, 1);
  const int64_t groups = ceil_div(p.k, width);
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t column = begin * kTileRows; column < std::min(p.n, end * kTileRows); ++column) {
      const int64_t tile = (column / kTileRows) * words * kTileRows + column % kTileRows;
      const auto bit = [&](const int32_t* tiles, int64_t i) {
        return (static_cast<uint32_t>(tiles[tile + (i / 32) * kTileRows]) >> (i % 32)) & 1u;
      };
      float value = 0.0f;
      for (int64_t group = 0; group < groups; ++group) {
        int32_t dot = 0;
        for (int64_t i = group * width; i < std::min(p.k, (group + 1) * width); ++i) {
          if (p.weight_nonzero && !bit(p.weight_nonzero, i)) continue;
          dot += bit(p.weight, i) ? p.q[row * p.k + i] : -p.q[row * p.k + i];
        }
        const float term = p.scale[column * groups + group] * p.row_scale[row] * static_cast<float>(dot);
        value = group == 0 ? term : value + term;
      }
      if (p.bias) value += p.bias[column];
      with_dtype(p.out_dtype, p.out, [&](auto* out) { store(value, out + row * p.n + column); });
    }
  }
}

namespace {

constexpr int64_t kRowsOfTables = 4;  // from so many rows on, tables of sums win

struct Kernel {
  void (*tiles)(const BinaryInt8MatmulParams&, int64_t, int64_t);
  double nanoseconds_per_word;  // of one row and one output
};

Kernel choose_kernel([[maybe_unused]] const BinaryInt8MatmulParams& p) {
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512 && !p.weight_nonzero && p.k > 0) {
    if (p.m < kRowsOfTables && has_int8_dot()) return {binary_int8_matmul_tiles_avx512vnni, 0.2};
    return {binary_int8_matmul_tiles_avx512, 0.1};
  }
#endif
  return {binary_int8_matmul_tiles_generic, 30.0};
}

}  // namespace
}  // namespace detail

Status binary_int8_matmul(const BinaryInt8MatmulParams& p) {
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.group_size < 0 || p.group_size % 32 != 0) return Status::bad_argument;
  const auto [tiles, nanoseconds_per_word] = detail::choose_kernel(p);
  const double words = static_cast<double>(p.m) * static_cast<double>(word_count(p.k) + 2) * kTileRows;
  split(p.parallel_for, tile_count(p.n), words * nanoseconds_per_word,
        [&, tiles = tiles](int64_t begin, int64_t end) { tiles(p, begin, end); });
  return Status::ok;
}

}  // namespace bitmill
