// SPDX-License-Identifier: Apache-2.0
// The salient part of a list or a bitmap for many rows, with AVX2: how tiles go through the columns. Rows of
// activations are transposed to [column][32], so that a salient weight is one number times some vectors of rows: the
// work falls with the number of salient weights. What limits it are the activations, which come from the second-level
// cache: some tiles go through the columns together, window by window, so that they stay there. A Form (floats or
// integers) says how entries are decoded and added.
#pragma once

#include "salient_scatter_avx2.h"

namespace bitmill::detail {
namespace {

inline constexpr int64_t kBlockRows = 32;             // rows transposed together
inline constexpr int64_t kTilesTogether = 16;         // tiles that go through the columns together
inline constexpr int64_t kWindowWords = 24;           // words of a mask that are decoded together
inline constexpr int64_t kTransposedBytes = 1 << 21;  // of activations: a salient weight is decoded once for so many
inline constexpr int64_t kMostEntries = kTileRows * 32 * kWindowWords;
static_assert(kMostEntries >= kTileRows * kListSteps);

// Entries of a tile, decoded. Columns count from the first one of the window, values are what Form multiplies.
template <class Value>
struct Chunk {
  alignas(32) uint16_t column[kMostEntries + 16];
  alignas(32) Value value[kMostEntries + 16];
  int64_t first[kTileRows], count[kTileRows];  // of each output
};

// A tile on its way through the columns.
struct Walk {
  TileFactors factors;
  ListColumns list;
  int64_t step, end;         // of a list
  int64_t entry[kTileRows];  // of a bitmap

  void begin(const SalientTask& task, int64_t tile) {
    const SalientWeight& w = task.weight;
    factors.load(task, tile);
    if (w.encoding == SalientEncoding::list) {
      list = ListColumns();
      step = w.start[tile], end = w.start[tile + 1];
    } else {
      for (int64_t lane = 0; lane < outputs_of_tile(w, tile); ++lane) entry[lane] = w.start[tile * kTileRows + lane];
    }
  }
};

// Rows of activations, 32 at a time: `count` blocks of `size` = (k + 1) x 32 elements, columns first. Column k is 0.
template <class Form>
struct Blocks {
  const typename Form::Element* x;
  int64_t size, count, rows;

  // Elements of a column: the rows of the last block may take fewer vectors.
  int64_t stride(int64_t block) const {
    const int64_t left = rows - block * kBlockRows;
    return left > 16 ? 32 : left > 8 ? 16 : Form::kVector;
  }
};

// Adds a chunk, whose columns count from `origin`, to the sums of a tile.
template <class Form, int stride>
static void add_chunk(const typename Form::Entries& chunk, int64_t origin, const Blocks<Form>& blocks,
                      typename Form::Sum* sums) {
  for (int64_t i = 0; i < blocks.count; ++i, sums += Form::kSums) {
    const int64_t width = blocks.stride(i);
    const auto add = width == 32   ? Form::template add_entries<32, stride>
                     : width == 16 ? Form::template add_entries<16, stride>
                                   : Form::template add_entries<Form::kVector, stride>;
    const auto* x = blocks.x + i * blocks.size + origin * width;
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      const int64_t first = chunk.first[lane];
      add(chunk.column + first, chunk.value + first, chunk.count[lane], x, sums + lane * kBlockRows);
    }
  }
}

// Tiles [begin, end), at most kTilesTogether, all columns.
template <class Form>
static void add_tiles(const SalientTask& task, int64_t begin, int64_t end, const Blocks<Form>& blocks, Walk* walks,
                      typename Form::Entries& chunk, typename Form::Sum* sums) {
  const int64_t words = word_count(task.weight.k), size = blocks.count * Form::kSums;
  for (int64_t i = 0; i < (end - begin) * size; ++i) sums[i] = 0;
  if (task.weight.encoding == SalientEncoding::list) {
    for (bool more = true; more;) {
      more = false;
      for (int64_t i = 0; i < end - begin; ++i) {
        if (walks[i].step == walks[i].end) continue;
        Form::decode_list(task, walks[i], chunk);
        add_chunk<Form, kTileRows>(chunk, 0, blocks, sums + i * size);
        more = true;
      }
    }
  } else {
    for (int64_t word = 0; word < words; word += kWindowWords) {
      const int64_t stop = word + kWindowWords < words ? word + kWindowWords : words;
      for (int64_t i = 0; i < end - begin; ++i) {
        Form::decode_bitmap(task, begin + i, word, stop, walks[i], chunk);
        add_chunk<Form, 1>(chunk, 32 * word, blocks, sums + i * size);
      }
    }
  }
}

// x: [m, k]. totals: [m, groups].
template <class Form>
static void multiply_transposed(const SalientTask& task, const typename Form::Input* x, const float* totals,
                                int64_t begin, int64_t end) {
  const int64_t k = task.weight.k, size = (k + 1) * kBlockRows, bytes = size * sizeof(typename Form::Element);
  const int64_t all = ceil_div(task.m, kBlockRows), most = bytes < kTransposedBytes ? kTransposedBytes / bytes : 1;
  const int64_t together = most < all ? most : all, tiles = end - begin < kTilesTogether ? end - begin : kTilesTogether;
  Scratch<typename Form::Element> turned(together * size, {});
  Scratch<typename Form::Sum> sums(tiles * together * Form::kSums, {});
  Scratch<float> factor(tiles * 2 * task.groups * kTileRows, 0);
  Scratch<Walk> walks(tiles, Walk());
  Scratch<typename Form::Entries> chunk(1, {});
  for (int64_t i = 0; i < tiles; ++i) {
    walks[i].factors.base = factor + 2 * i * task.groups * kTileRows;
    walks[i].factors.mu = task.weight.mu ? walks[i].factors.base + task.groups * kTileRows : nullptr;
  }
  for (int64_t row = 0; row < task.m; row += together * kBlockRows) {
    const int64_t left = task.m - row, count = left < together * kBlockRows ? left : together * kBlockRows;
    const Blocks<Form> blocks{turned, size, ceil_div(count, kBlockRows), count};
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t first = i * kBlockRows, here = count - first < kBlockRows ? count - first : kBlockRows;
      auto* block = turned + i * size;
      const int64_t stride = blocks.stride(i);
      Form::transpose(x + (row + first) * k, k, here, stride, block);
      for (int64_t j = 0; j < stride; ++j) block[k * stride + j] = 0;
    }
    for (int64_t tile = begin; tile < end; tile += tiles) {
      const int64_t stop = tile + tiles < end ? tile + tiles : end;
      for (int64_t i = 0; i < stop - tile; ++i) walks[i].begin(task, tile + i);
      add_tiles<Form>(task, tile, stop, blocks, walks, *chunk, sums);
      for (int64_t i = 0; i < stop - tile; ++i) {
        for (int64_t first = 0; first < count; first += 8) {
          const int64_t here = count - first < 8 ? count - first : 8;
          const auto* from = sums + (i * blocks.count + first / kBlockRows) * Form::kSums + first % kBlockRows;
          const auto rows_of = [&](int64_t lane) { return Form::eight_rows(from, lane, walks[i].factors); };
          finish_rows(task, row + first, here, tile + i, rows_of, walks[i].factors,
                      totals + (row + first) * task.groups);
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitmill::detail
