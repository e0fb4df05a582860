// SPDX-License-Identifier: Apache-2.0
// What the FP4 products with AVX-512 share: blocks of 8 or 4 activation rows times 2 or 4 tiles, and of 1 row times 8.
// A table lookup decodes the 16 outputs of a tile once for all rows of a block. A `Path` decides how activations are
// stored and multiplied:
//   Input                   what activations are
//   Sum, Values             16 sums, and what a lookup gives
//   kSteps                  lookups a word of 8 codes; a step takes one 32-bit element of each activation row
//   kWords                  words of a group, if that is known; 0 otherwise
//   fours(rows)             how many of the last rows, fewer than 8, are taken in fours; the others one by one
//   elements(x, k, first)   16 elements of a row of k activations, zeros past its end
//   lookup(codes)           what the lowest bits of each lane stand for
//   next<rows>(codes)       the codes of the next step, in the lowest bits
//   start(row, group)       what a sum begins with
//   broadcast(element)      a
//   multiply_add(sum, a, w)
//   unit                    what a scale is multiplied with
//   fold(result, scale, sum, row, group)     a group's sum added to the result; group -1 is one of zeros, if kWords > 0
//   finish(task, row, column, lanes, value, bias)  16 results to memory
// Sums run over the columns first to last, one accumulator an output: they depend neither on the threads nor on the
// size of the block that a row is in.
#pragma once

#include "avx512.h"
#include "fp4_matmul.h"
#include "fp4_scales_avx512.h"
#include "layout.h"
#include "read_ahead.h"
#include "scratch.h"

namespace bitmill::detail {

inline constexpr int64_t kChunkTiles = 8;    // tiles whose scales are expanded together, and side by side for one row
inline constexpr int64_t kPackedRows = 256;  // rows packed together; fewer if k is large
inline constexpr int64_t kOverlappedRows = 32;  // from so many rows on sums of short groups are folded by the way
// How far ahead one row asks for codes, 2 KiB a tile, and to the second-level cache: 8 tiles fill half of the first.
inline constexpr int64_t kPrefetchWords = 32;

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

// n <= rows rows of k activations to elements [words * kSteps][rows], zeros past k and n.
template <class Path, int rows>
static void pack(const Path& path, const typename Path::Input* x, int64_t k, float* out, int64_t n) {
  const int64_t count = word_count(k, 4) * Path::kSteps;
  for (int64_t first = 0; first < count; first += 16) {
    if constexpr (rows == 1) {
      _mm512_storeu_ps(out + first, path.elements(x, k, first));
    } else {
      for (int half = 0; half < rows; half += 4) {
        __m512 z[4];
        for (int i = 0; i < 4; ++i) {
          z[i] = half + i < n ? path.elements(x + (half + i) * k, k, first) : _mm512_setzero_ps();
        }
        transpose4(z);
        for (int i = 0; i < 4; ++i) {
          float* to = out + (first + i) * rows + half;
          _mm_storeu_ps(to, _mm512_castps512_ps128(z[i]));
          _mm_storeu_ps(to + 4 * rows, _mm512_extractf32x4_ps(z[i], 1));
          _mm_storeu_ps(to + 8 * rows, _mm512_extractf32x4_ps(z[i], 2));
          _mm_storeu_ps(to + 12 * rows, _mm512_extractf32x4_ps(z[i], 3));
        }
      }
    }
  }
}

// What paths with float sums share. T: the dtype of activations and results.
template <class T>
struct FloatSums {
  using Input = T;
  using Sum = __m512;
  static constexpr int kWords = 0;
  static constexpr float unit = 1.0f;

  static Sum start(int64_t, int64_t) { return _mm512_setzero_ps(); }
  static __m512 broadcast(float element) { return _mm512_set1_ps(element); }

  static __m512 fold(__m512 result, __m512 scale, Sum sum, int64_t, int64_t) {
    return _mm512_fmadd_ps(scale, sum, result);
  }

  static void finish(const Fp4Task& task, int64_t row, int64_t column, __mmask16 lanes, __m512 value, __m512 bias) {
    store16(static_cast<T*>(task.p.out) + row * task.p.weight.n + column, lanes, _mm512_add_ps(value, bias));
  }
};

// With word w of `tiles` tiles a line of codes is asked for with each of them, and now and then one of a page. Rows
// that are multiplied together leave memory the time of these tiles for the next ones, which are read from the first
// line to the last. One row does not: it asks for its own words, and past their end for those of the next tiles.
template <int rows, int tiles>
[[gnu::always_inline]] static inline void request_line(const Fp4Task& task, const int32_t* const* codes, int64_t w,
                                                       int t) {
  if constexpr (rows > 1) {
    __builtin_prefetch(codes[0] + ((task.words + w) * tiles + t) * kTileRows, 0, 2);
  } else {
    const int64_t ahead = w + kPrefetchWords, past = ahead < task.words ? 0 : (tiles - 1) * task.words;
    __builtin_prefetch(codes[t] + (ahead + past) * kTileRows, 0, 2);
  }
}
template <int rows, int tiles>
[[gnu::always_inline]] static inline void request_page(const Fp4Task& task, const int32_t* const* codes, int64_t w) {
  if constexpr (rows > 1) {
    if (w % (kPageWords / tiles) == 0) read_page_ahead(codes[0] + (task.words + w) * tiles * kTileRows);
  } else if (begins_page(w)) {
    for (int t = 0; t < tiles; ++t) read_page_ahead(codes[t] + w * kTileRows);
  }
}

// Results [rows][tiles][16] of a block to memory, except those past the last row or tile.
template <class Path>
static void finish_rows(const Fp4Task& task, const Path& path, int64_t row, int rows, int64_t tile, int tiles,
                        const float* result) {
  const Fp4MatmulParams& p = task.p;
  for (int t = 0; t < tiles && tile + t < task.end; ++t) {
    const int64_t column = (tile + t) * kTileRows;
    const __mmask16 lanes = first_lanes(p.weight.n - column);
    const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(lanes, p.bias + column) : _mm512_set1_ps(-0.0f);
    for (int r = 0; r < rows && row + r < p.m; ++r) {
      const __m512 value = _mm512_loadu_ps(result + (r * tiles + t) * kTileRows);
      path.finish(task, row + r, column, lanes, value, bias);
    }
  }
}

// Asks for the lines that a block is going to write, which arrive while it is computed.
static inline void request_output(const Fp4Task& task, int64_t row, int rows, int64_t tile, int tiles) {
  const Fp4MatmulParams& p = task.p;
  const int64_t bytes = bytes_of(p.dtype);
  for (int r = 0; r < rows && row + r < p.m; ++r) {
    const char* out = static_cast<const char*>(p.out) + ((row + r) * p.weight.n + tile * kTileRows) * bytes;
    for (int t = 0; t < tiles; ++t) __builtin_prefetch(out + t * kTileRows * bytes, 1);
  }
}

// `rows` packed rows x times `tiles` tiles side by side.
template <class Path, int rows, int tiles>
static void block(const Fp4Task& task, const Path& path, int64_t row, int64_t tile, const float* x) {
  const int32_t* codes[tiles];
  const float* scales[tiles];
  for (int t = 0; t < tiles; ++t) {
    codes[t] = task.codes(tile + t);
    scales[t] = task.scales(tile + t);
  }
  if constexpr (rows > 1) request_output(task, row, rows, tile, tiles);
  alignas(64) float result[rows][tiles][kTileRows] = {};
  for (int64_t group = 0; group < task.groups; ++group) {
    typename Path::Sum sum[rows][tiles];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) sum[r][t] = path.start(row + r, group);
    }
    const auto add_word = [&](int64_t w) __attribute__((always_inline)) {
      if constexpr (Path::kWords == 0) request_page<rows, tiles>(task, codes, w);
      __m512i bits[tiles];
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) {
        bits[t] = _mm512_loadu_si512(codes[t] + w * kTileRows);
        request_line<rows, tiles>(task, codes, w, t);
      }
#pragma GCC unroll 1
      for (int j = 0; j < Path::kSteps; ++j) {
        const float* a = x + (w * Path::kSteps + j) * rows;
        typename Path::Values values[tiles];
#pragma GCC unroll 8
        for (int t = 0; t < tiles; ++t) {
          values[t] = path.lookup(bits[t]);
          bits[t] = Path::template next<rows>(bits[t]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const auto broadcast = Path::broadcast(a[r]);
#pragma GCC unroll 8
          for (int t = 0; t < tiles; ++t) sum[r][t] = Path::multiply_add(sum[r][t], broadcast, values[t]);
        }
      }
    };
    const int64_t begin = group * task.group_words, end = task.group_end(group);
    if constexpr (Path::kWords > 0) request_page<rows, tiles>(task, codes, begin);
    if (Path::kWords > 0 && end - begin == Path::kWords) {  // the end of so short a loop would be predicted wrongly
#pragma GCC unroll 4
      for (int i = 0; i < Path::kWords; ++i) add_word(begin + i);
    } else {
      for (int64_t w = begin; w < end; ++w) add_word(w);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tiles; ++t) {
      const __m512 scale = _mm512_loadu_ps(scales[t] + group * kTileRows);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        _mm512_store_ps(result[r][t], path.fold(_mm512_load_ps(result[r][t]), scale, sum[r][t], row + r, group));
      }
    }
  }
  finish_rows(task, path, row, rows, tile, tiles, result[0][0]);
}

// 4 of 8 packed rows x times two tiles, of short groups that are whole: results stay in registers, and the sums of a
// group are folded while those of the next are computed. The group before the first has sums and scales of 0.
// `first`: nobody has read these codes before.
template <class Path>
static void overlapped(const Fp4Task& task, const Path& path, int64_t row, int64_t tile, const float* x, bool first) {
  constexpr int rows = 4, tiles = 2, packed = 8, steps = Path::kWords * Path::kSteps;
  static_assert(steps % rows == 0);
  const int32_t* const codes[tiles] = {task.codes(tile), task.codes(tile + 1)};
  const float *scales0 = task.scales(tile), *scales1 = task.scales(tile + 1);
  request_output(task, row, rows, tile, tiles);
  typename Path::Sum before[rows][tiles];
  __m512 result[rows][tiles], scale0 = _mm512_setzero_ps(), scale1 = scale0;
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    result[r][0] = result[r][1] = _mm512_setzero_ps();
    before[r][0] = before[r][1] = _mm512_setzero_si512();
  }
  const auto fold = [&](int r, int64_t group) __attribute__((always_inline)) {
    result[r][0] = path.fold(result[r][0], scale0, before[r][0], row + r, group);
    result[r][1] = path.fold(result[r][1], scale1, before[r][1], row + r, group);
    asm volatile("" : "+v"(result[r][0]), "+v"(result[r][1]));  // here, and not after all sums
  };
  for (int64_t group = 0; group < task.groups; ++group) {
    typename Path::Sum sum[rows][tiles];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = path.start(row + r, group);
#pragma GCC unroll 4
    for (int i = 0; i < Path::kWords; ++i) {
      const int64_t w = group * Path::kWords + i;
      __m512i bits0 = _mm512_loadu_si512(codes[0] + w * kTileRows),
              bits1 = _mm512_loadu_si512(codes[1] + w * kTileRows);
      if (first) request_line<rows, tiles>(task, codes, w, 0), request_line<rows, tiles>(task, codes, w, 1);
#pragma GCC unroll 2
      for (int j = 0; j < Path::kSteps; ++j) {
        const float* a = x + (w * Path::kSteps + j) * packed;
        const typename Path::Values values0 = path.lookup(bits0), values1 = path.lookup(bits1);
        bits0 = Path::template next<rows>(bits0);
        bits1 = Path::template next<rows>(bits1);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          const auto broadcast = Path::broadcast(a[r]);
          sum[r][0] = Path::multiply_add(sum[r][0], broadcast, values0);
          sum[r][1] = Path::multiply_add(sum[r][1], broadcast, values1);
        }
        const int step = i * Path::kSteps + j;
        if (step % (steps / rows) == 0) fold(step / (steps / rows), group - 1);
      }
    }
    scale0 = _mm512_loadu_ps(scales0 + group * kTileRows);
    scale1 = _mm512_loadu_ps(scales1 + group * kTileRows);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) before[r][0] = sum[r][0], before[r][1] = sum[r][1];
  }
  alignas(64) float results[rows][tiles][kTileRows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    fold(r, task.groups - 1);
    _mm512_store_ps(results[r][0], result[r][0]);
    _mm512_store_ps(results[r][1], result[r][1]);
  }
  finish_rows(task, path, row, rows, tile, tiles, results[0][0]);
}

// Tiles [begin, end) of all rows. A function of its own: where two paths are in one, g++ 12 runs out of registers.
template <class Path>
[[gnu::noinline]] static void multiply_tiles(const Fp4MatmulParams& p, const Path& path, int64_t begin, int64_t end) {
  const int64_t k = p.weight.k, words = word_count(k, 4);
  const int64_t group_words = p.weight.group_size > 0 ? p.weight.group_size / 8 : words;
  Fp4Task task{p, words, ceil_div(words, group_words), group_words, end, begin, nullptr};
  const int64_t stride = ceil_div(words * Path::kSteps, 16) * 16;  // elements of a packed row
  const int64_t fit = (int64_t{1} << 20) / stride / 8 * 8;
  const int64_t most = fit < 8 ? 8 : fit < kPackedRows ? fit : kPackedRows;
  Scratch<float> packed((p.m < most ? ceil_div(p.m, 4) * 4 : most) * stride);
  const int64_t chunk_tiles = end - begin < kChunkTiles ? end - begin : kChunkTiles;
  Scratch<float> scale(chunk_tiles * task.groups * kTileRows);
  task.scale = scale;
  for (int64_t first = 0; first < p.m; first += most) {
    const int64_t rows = p.m - first < most ? p.m - first : most;
    const auto* x = static_cast<const typename Path::Input*>(p.x) + first * k;
    const int64_t eights = rows / 8 * 8, fours = eights + Path::fours(rows - eights);
    for (int64_t row = 0; row < eights; row += 8) pack<Path, 8>(path, x + row * k, k, packed + row * stride, 8);
    for (int64_t row = eights; row < fours; row += 4) {
      pack<Path, 4>(path, x + row * k, k, packed + row * stride, rows - row < 4 ? rows - row : 4);
    }
    for (int64_t row = fours; row < rows; ++row) pack<Path, 1>(path, x + row * k, k, packed + row * stride, 1);
    for (task.chunk = begin; task.chunk < end; task.chunk += kChunkTiles) {
      const int64_t after = task.chunk + kChunkTiles < end ? task.chunk + kChunkTiles : end;
      for (int64_t tile = task.chunk; tile < after; ++tile) {
        float* lanes = scale + (tile - task.chunk) * task.groups * kTileRows;
        expand_scales(p.weight, task.groups, tile, path.unit, lanes);
        if (tile + kChunkTiles < end) prefetch_scales(p.weight, task.groups, tile + kChunkTiles);
      }
      for (int64_t tile = task.chunk; tile < after; tile += 2) {
        for (int64_t row = 0; row < eights; row += 8) {
          const float* x8 = packed + row * stride;
          if constexpr (Path::kWords > 0) {
            if (eights >= kOverlappedRows && task.words == task.groups * Path::kWords) {
              overlapped(task, path, first + row, tile, x8, row == 0);
              overlapped(task, path, first + row + 4, tile, x8 + 4, false);
              continue;
            }
          }
          block<Path, 8, 2>(task, path, first + row, tile, x8);
        }
      }
      for (int64_t row = eights; row < fours; row += 4) {
        for (int64_t tile = task.chunk; tile < after; tile += 4) {
          block<Path, 4, 4>(task, path, first + row, tile, packed + row * stride);
        }
      }
      for (int64_t row = fours; row < rows; ++row) {
        block<Path, 1, kChunkTiles>(task, path, first + row, task.chunk, packed + row * stride);
      }
    }
  }
}

}  // namespace bitmill::detail
