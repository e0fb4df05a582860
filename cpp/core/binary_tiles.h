// SPDX-License-Identifier: Apache-2.0
// Binary products for instruction sets without masked loads: everything but the counting. A set counts, for some rows
// and a block of `columns` outputs, the bits where activation and weight are opposite; the loops here are plain C++
// that the compiler vectorises for that set. The scales and the bias of a block are copied once, padded, so that a row
// is always finished whole; only the last copy knows where the outputs end.
#pragma once

#include <cstring>

#include "binary_matmul.h"
#include "bit_output.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill::detail {

namespace {

struct BinaryTask {
  explicit BinaryTask(const BinaryMatmulParams& p);

  const BinaryMatmulParams& p;
  int64_t words, group_words, groups;
  Scratch<int32_t> present;  // [m, groups]: the columns of the group where the activation is not 0

  int64_t group_end(int64_t group) const {
    const int64_t end = (group + 1) * group_words;
    return end < words ? end : words;
  }
};

}  // namespace

template <int columns>
struct OutputBlock {
  int64_t first, count;  // the output columns
  float* scale;          // [groups, columns]
  alignas(64) float bias[columns];
};

// All three operands are pc((s ^ w) & z): z is everything, the nonzero bits, or s itself (then s ^ w is s & ~w).
static inline uint32_t nonzero_word(const BinaryMatmulParams& p, int64_t word) {
  if (p.operand == Operand::sign) return ~0u;
  return static_cast<uint32_t>(p.operand == Operand::ternary ? p.a_nonzero[word] : p.a[word]);
}

inline BinaryTask::BinaryTask(const BinaryMatmulParams& p)
    : p(p),
      words(word_count(p.k)),
      group_words(p.group_size > 0 && !p.dot && !p.bits.sign ? p.group_size / 32 : words),
      groups(ceil_div(words, group_words)),
      present(p.m * groups) {
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * group_words, end = group_end(group);
      int64_t count = 0;
      if (p.operand == Operand::sign) {  // the pad of both operands is 0, so it is never opposite
        count = (32 * end < p.k ? 32 * end : p.k) - 32 * begin;
      } else {
        for (int64_t w = begin; w < end; ++w) count += __builtin_popcount(nonzero_word(p, row * words + w));
      }
      present[row * groups + group] = static_cast<int32_t>(count);
    }
  }
}

// The block that begins with `tile`. Tiles from `end` on belong to somebody else.
template <int columns>
static void load_block(const BinaryTask& task, int64_t tile, int64_t end, OutputBlock<columns>& block) {
  const BinaryMatmulParams& p = task.p;
  const int64_t first = tile * kTileRows, left = (p.n < end * kTileRows ? p.n : end * kTileRows) - first;
  block.first = first;
  block.count = left < columns ? left : columns;
  if (p.dot || p.bits.sign) return;
  for (int64_t i = 0; i < columns; ++i) {
    const bool inside = i < block.count;
    block.bias[i] = inside && p.bias ? p.bias[first + i] : -0.0f;  // x + -0 is x, for every x
    for (int64_t group = 0; group < task.groups; ++group) {
      block.scale[group * columns + i] = inside ? p.scale[(first + i) * task.groups + group] : 0.0f;
    }
  }
}

// Counts of one row and group to dot products, bits, or floats that `sums` carries from group to group. `convert`
// writes `columns` floats as another dtype; `inside` as for store_bits.
template <int columns, class Convert, class Inside>
static inline void finish_row(const BinaryTask& task, const OutputBlock<columns>& block, int64_t row, int64_t group,
                              const int32_t* opposite, float* sums, const Convert& convert, const Inside& inside) {
  const BinaryMatmulParams& p = task.p;
  const int32_t present = task.present[row * task.groups + group];
  const int64_t at = row * p.n + block.first;
  const bool whole = block.count == columns;
  if (p.dot) {
    int32_t part[columns];
    int32_t* out = whole ? p.dot + at : part;
    for (int i = 0; i < columns; ++i) out[i] = present - 2 * opposite[i];
    if (!whole) std::memcpy(p.dot + at, part, static_cast<size_t>(block.count) * sizeof(int32_t));
    return;
  }
  if (p.bits.sign) {
    int32_t dot[columns];
    for (int i = 0; i < columns; ++i) dot[i] = present - 2 * opposite[i];
    for (int64_t i = 0; i < block.count; i += kTileRows) {
      const int64_t left = block.count - i;
      const int64_t count = left < kTileRows ? left : kTileRows;
      store_bits(p.bits, p.n, row, (block.first + i) / kTileRows, dot + i, count, inside);
    }
    return;
  }
  const float factor = p.row_scale ? p.row_scale[row] : 1.0f;  // times 1 is exact
  const float* scale = block.scale + group * columns;
  float value[columns];
  for (int i = 0; i < columns; ++i) value[i] = scale[i] * factor * static_cast<float>(present - 2 * opposite[i]);
  if (group > 0) {
    for (int i = 0; i < columns; ++i) value[i] = sums[i] + value[i];
  }
  if (group + 1 < task.groups) {
    std::memcpy(sums, value, sizeof value);
    return;
  }
  for (int i = 0; i < columns; ++i) value[i] += block.bias[i];
  for (int64_t i = 0; p.residual && i < block.count; ++i) value[i] += p.residual[at + i];
  with_dtype(p.out_dtype, p.out, [&]<class T>(T* out) {
    if (whole) return convert(value, out + at);
    T part[columns];
    convert(value, part);
    std::memcpy(out + at, part, static_cast<size_t>(block.count) * sizeof(T));
  });
}

}  // namespace bitmill::detail
