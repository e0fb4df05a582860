// SPDX-License-Identifier: Apache-2.0
// What the FP4 products with AVX-512 share: blocks of 8 or 4 activation rows times 2 or 4 tiles. A table lookup decodes
// the 16 outputs of a tile once for all rows of a block. A `Path` decides how activations are stored and multiplied:
//   kSingles                   whether the last 1 to 3 rows are taken one by one, by pack<1> and single<T>
//   fours(rows)                how many of the last rows, fewer than 8, are taken in fours
//   kSteps                     lookups a word of 8 codes; a step takes one 32-bit element of each activation row
//   pack<rows>(x, k, out, n)   n <= rows activation rows to [words][kSteps][rows] elements, zeros past k and n
//   lookup(codes)              what the lowest bits of each lane stand for
//   next(codes)                the codes of the next step, in the lowest bits
//   multiply_add(sum, a, w)
// Sums run over the columns first to last, one accumulator an output: they depend neither on the threads nor on the
// size of the block that a row is in.
#pragma once

#include <new>

#include "avx512.h"
#include "fp4.h"
#include "fp4_scales_avx512.h"
#include "layout.h"

namespace bitmill::detail {

inline constexpr int64_t kChunkTiles = 8;    // tiles whose scales are expanded together
inline constexpr int64_t kPackedRows = 256;  // rows packed together; fewer if k is large

template <class T>
static T* new_aligned(int64_t count) {
  return new (std::align_val_t{64}) T[static_cast<size_t>(count)];
}
template <class T>
static void delete_aligned(T* array) {
  ::operator delete[](array, std::align_val_t{64});
}

struct Fp4Task {
  const Fp4MatmulParams& p;
  int64_t words, groups, group_words;
  int64_t end;         // the first tile that belongs to somebody else
  int64_t chunk;       // the tile that `scale` begins with
  const float* scale;  // [kChunkTiles][groups][16]

  // Tiles past the end repeat the last one, and are not stored.
  int64_t clamp(int64_t tile) const { return tile < end ? tile : end - 1; }
  const int32_t* codes(int64_t tile) const { return p.weight.tiles + clamp(tile) * words * kTileRows; }
  const float* scales(int64_t tile) const { return scale + (clamp(tile) - chunk) * groups * kTileRows; }
  int64_t group_end(int64_t group) const {
    const int64_t next = (group + 1) * group_words;
    return next < words ? next : words;
  }
};

// The sums of one group to the result: scaled, carried in `partial` from group to group, finished after the last one.
template <class T>
static inline void finish(const Fp4Task& task, int64_t row, int64_t tile, int64_t group, __m512 sum, float* partial) {
  const __m512 scale = _mm512_loadu_ps(task.scales(tile) + group * kTileRows);
  const __m512 value = group == 0 ? _mm512_mul_ps(scale, sum) : _mm512_fmadd_ps(scale, sum, _mm512_loadu_ps(partial));
  if (group + 1 < task.groups) return _mm512_storeu_ps(partial, value);
  if (tile >= task.end || row >= task.p.m) return;
  const int64_t column = tile * kTileRows;
  const __mmask16 lanes = first_lanes(task.p.weight.n - column);
  const __m512 bias = task.p.bias ? _mm512_maskz_loadu_ps(lanes, task.p.bias + column) : _mm512_set1_ps(-0.0f);
  store16(static_cast<T*>(task.p.out) + row * task.p.weight.n + column, lanes, _mm512_add_ps(value, bias));
}

// `rows` packed rows x times `tiles` tiles side by side.
template <class Path, class T, int rows, int tiles>
static void block(const Fp4Task& task, const Path& path, int64_t row, int64_t tile, const float* x) {
  const int32_t* codes[tiles];
  for (int t = 0; t < tiles; ++t) codes[t] = task.codes(tile + t);
  float partial[rows][tiles][kTileRows];
  for (int64_t group = 0; group < task.groups; ++group) {
    __m512 sum[rows][tiles];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) sum[r][t] = _mm512_setzero_ps();
    }
    const int64_t end = task.group_end(group);
    for (int64_t w = group * task.group_words; w < end; ++w) {
      __m512i bits[tiles];
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) bits[t] = _mm512_loadu_si512(codes[t] + w * kTileRows);
#pragma GCC unroll 1
      for (int j = 0; j < Path::kSteps; ++j) {
        const float* a = x + (w * Path::kSteps + j) * rows;
        typename Path::Values values[tiles];
#pragma GCC unroll 8
        for (int t = 0; t < tiles; ++t) {
          values[t] = path.lookup(bits[t]);
          bits[t] = Path::next(bits[t]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const __m512 broadcast = _mm512_set1_ps(a[r]);
#pragma GCC unroll 8
          for (int t = 0; t < tiles; ++t) sum[r][t] = Path::multiply_add(sum[r][t], broadcast, values[t]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) finish<T>(task, row + r, tile + t, group, sum[r][t], partial[r][t]);
    }
  }
}

// Tiles [begin, end) of all rows.
template <class Path, class T>
static void multiply_tiles(const Fp4MatmulParams& p, const Path& path, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.weight.k, 4);
  const int64_t group_words = p.weight.group_size > 0 ? p.weight.group_size / 8 : words;
  Fp4Task task{p, words, ceil_div(words, group_words), group_words, end, begin, nullptr};
  const int64_t stride = ceil_div(p.weight.k, 16) * 2 * Path::kSteps;  // elements of a packed row
  const int64_t fit = (int64_t{1} << 20) / stride / 8 * 8;
  const int64_t most = fit < 8 ? 8 : fit < kPackedRows ? fit : kPackedRows;
  float* packed = new_aligned<float>((p.m < most ? ceil_div(p.m, 4) * 4 : most) * stride);
  const int64_t chunk_tiles = end - begin < kChunkTiles ? end - begin : kChunkTiles;
  float* scale = new_aligned<float>(chunk_tiles * task.groups * kTileRows);
  task.scale = scale;
  for (int64_t first = 0; first < p.m; first += most) {
    const int64_t rows = p.m - first < most ? p.m - first : most;
    const T* x = static_cast<const T*>(p.x) + first * p.weight.k;
    const int64_t eights = rows / 8 * 8, fours = eights + Path::fours(rows - eights);
    for (int64_t row = 0; row < eights; row += 8)
      path.template pack<8>(x + row * p.weight.k, p.weight.k, packed + row * stride, 8);
    for (int64_t row = eights; row < fours; row += 4)
      path.template pack<4>(x + row * p.weight.k, p.weight.k, packed + row * stride, rows - row < 4 ? rows - row : 4);
    if constexpr (Path::kSingles) {
      for (int64_t row = fours; row < rows; ++row)
        path.template pack<1>(x + row * p.weight.k, p.weight.k, packed + row * stride, 1);
    }
    for (task.chunk = begin; task.chunk < end; task.chunk += kChunkTiles) {
      const int64_t after = task.chunk + kChunkTiles < end ? task.chunk + kChunkTiles : end;
      for (int64_t tile = task.chunk; tile < after; ++tile) {
        expand_scales(p.weight, task.groups, tile, scale + (tile - task.chunk) * task.groups * kTileRows);
      }
      for (int64_t tile = task.chunk; tile < after; tile += 2) {
        for (int64_t row = 0; row < eights; row += 8)
          block<Path, T, 8, 2>(task, path, first + row, tile, packed + row * stride);
      }
      for (int64_t row = eights; row < fours; row += 4) {
        for (int64_t tile = task.chunk; tile < after; tile += 4)
          block<Path, T, 4, 4>(task, path, first + row, tile, packed + row * stride);
      }
      if constexpr (Path::kSingles) {
        for (int64_t row = fours; row < rows; ++row)
          path.template single<T>(task, first + row, task.chunk, packed + row * stride);
      }
    }
  }
  delete_aligned(scale);
  delete_aligned(packed);
}

}  // namespace bitmill::detail
