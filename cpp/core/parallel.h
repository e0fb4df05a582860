// SPDX-License-Identifier: Apache-2.0
// Threads belong to the host: a kernel is handed a parallel_for and splits its own work.
#pragma once

#include <cstdint>

#include "layout.h"

namespace bitmill {

using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

static inline void serial_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  if (begin < end) body(context, begin, end);
}

// Nanoseconds: no part is smaller, since waking a thread costs about as much.
inline constexpr double kSmallestPart = 20000.0;

// Runs body(begin, end) over parts of [0, count). `cost` is the work of one item in nanoseconds, roughly.
template <class Body>
void split(ParallelFor parallel_for, int64_t count, double cost, const Body& body) {
  const double items = cost > 0 ? kSmallestPart / cost : static_cast<double>(count);
  const int64_t grain = items >= static_cast<double>(count) ? count : static_cast<int64_t>(items) + 1;
  const auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); };
  (count <= grain ? serial_for : parallel_for)(0, count, grain, call, const_cast<Body*>(&body));
}

// From so many rows on a product is split by rows: every part then prepares the activations of its own rows only.
// Below, it is split by outputs.
inline constexpr int64_t kManyRows = 64;
inline constexpr int64_t kRowUnit = 8;  // parts are whole blocks of the kernels

// Runs body(begin, end) over parts of `rows` rows that begin at multiples of kRowUnit; `cost` as for split, of one row.
template <class Body>
void split_rows(ParallelFor parallel_for, int64_t rows, double cost, const Body& body) {
  split(parallel_for, (rows + kRowUnit - 1) / kRowUnit, cost * kRowUnit,
        [&](int64_t begin, int64_t end) { body(begin * kRowUnit, end * kRowUnit < rows ? end * kRowUnit : rows); });
}

// A product of m rows and n outputs, by rows if they are many, else by tiles of outputs: run(first row, last row, first
// tile, last tile), the last ones excluded. `cost` is that of one output of one row.
template <class Run>
void split_product(ParallelFor parallel_for, int64_t m, int64_t n, double cost, const Run& run) {
  if (m >= kManyRows) {
    split_rows(parallel_for, m, cost * static_cast<double>(n),
               [&](int64_t begin, int64_t end) { run(begin, end, int64_t{0}, tile_count(n)); });
  } else {
    split(parallel_for, tile_count(n), cost * static_cast<double>(m * kTileRows),
          [&](int64_t begin, int64_t end) { run(int64_t{0}, m, begin, end); });
  }
}

// Rows and outputs both divided: by blocks of `least` to twice as many rows, and within a block by tiles. There are a
// power of two of them, so that threads, of which there mostly are, too, share none. run(row, rows, first tile, last
// tile), as few calls as there can be; `cost` is that of a row and a tile. `least`: a multiple of kRowUnit.
template <class Run>
void split_blocks(ParallelFor parallel_for, int64_t m, int64_t n, double cost, const Run& run,
                  int64_t least = kManyRows) {
  int64_t blocks = 1;
  while (m / (2 * blocks) >= least) blocks *= 2;
  const int64_t units = (m + kRowUnit - 1) / kRowUnit, tiles = tile_count(n);
  const auto first_row = [&](int64_t block) { return block < blocks ? units * block / blocks * kRowUnit : m; };
  const double rows = static_cast<double>(m) / static_cast<double>(blocks);
  split(parallel_for, blocks * tiles, cost * rows, [&](int64_t begin, int64_t end) {
    for (int64_t next; begin < end; begin = next) {
      const int64_t block = begin / tiles, tile = begin % tiles, whole = tile == 0 ? (end - begin) / tiles : 0;
      const int64_t last = whole ? block + whole : block + 1;
      next = whole || end > last * tiles ? last * tiles : end;
      run(first_row(block), first_row(last) - first_row(block), tile, next - (last - 1) * tiles);
    }
  });
}

}  // namespace bitmill
