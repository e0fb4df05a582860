// SPDX-License-Identifier: Apache-2.0
// Float activations times FP4 weights with AVX2. For many rows 192 columns of some tiles are decoded to panels of
// floats, which blocks of 6 activation rows are multiplied with: 12 sums, the most that leaves registers for operands.
// One row is multiplied with what a lookup gives at once, and needs no panel.
// Sums run over the words of a tile first to last, and over the columns of a word in the order of a lookup
// (decoded_column), one accumulator an output: they depend neither on the threads nor on how many rows there are.

#include "fp4_lookup_avx2.h"
#include "fp4_matmul.h"
#include "fp4_scales_avx2.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kBlockRows = 6;
constexpr int64_t kChunkTiles = 4;   // tiles decoded together: 48 KiB of panels, in the second-level cache
constexpr int64_t kPanelWords = 24;  // 192 columns: a panel of 12 KiB stays in the first-level cache
constexpr int64_t kPanel = kPanelWords * 8 * kTileRows;
constexpr int64_t kPackedRows = 192;  // rows packed together; fewer if k is large
constexpr int kSingleTiles = 2;       // side by side for one row
constexpr int64_t kPrefetchWords = 32;

struct Task {
  const Fp4MatmulParams& p;
  int64_t words, groups, group_words;
  int64_t end;  // the first tile that belongs to somebody else

  // Tiles past the end repeat the last one, and are not stored.
  int64_t clamp(int64_t tile) const { return tile < end ? tile : end - 1; }
  const int32_t* codes(int64_t tile) const { return p.weight.tiles + clamp(tile) * words * kTileRows; }
  int64_t group_end(int64_t group) const {
    const int64_t next = (group + 1) * group_words;
    return next < words ? next : words;
  }
};

// 8 columns of a row, zeros past k.
template <class T>
__m256 load_columns(const T* x, int64_t k, int64_t column) {
  if (column + 8 <= k) return load8(x + column);
  T last[8] = {};
  std::memcpy(last, x + column, static_cast<size_t>(k - column) * sizeof(T));
  return load8(last);
}

// n <= kBlockRows rows to [words][8][n], the columns of a word in the order of a lookup. Writes 8 floats past the end.
template <class T>
void pack(const T* x, int64_t k, int64_t n, float* out) {
  for (int64_t column = 0; column < k; column += 8) {
    __m256 z[8];
    for (int64_t i = 0; i < 8; ++i) z[i] = i < n ? load_columns(x + i * k, k, column) : _mm256_setzero_ps();
    transpose8(z);
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + (column + i) * n, z[decoded_column(i)]);
  }
}

// Words [begin, end) of a tile to a panel [columns][16].
template <int planes>
void decode(const Fp4TileLookup<planes>& lookup, const int32_t* codes, int64_t begin, int64_t end, float* panel) {
  for (int64_t w = begin; w < end; ++w, panel += 8 * kTileRows) {
    for (int lanes = 0; lanes < 2; ++lanes) {
      const __m256i pairs = lookup.load(codes + w * kTileRows + 8 * lanes);
      for (int half = 0; half < 2; ++half) {
        __m256 values[4];
        lookup(lookup.half(pairs, half), values);
        for (int i = 0; i < 4; ++i) _mm256_store_ps(panel + (4 * half + i) * kTileRows + 8 * lanes, values[i]);
      }
    }
  }
}

// What a block of rows adds up: of each tile [rows][16] sums of the present group, and results of those before it.
struct Sums {
  float *sum, *result;
  int64_t stride;  // from a tile to the next one
};

// `rows` packed rows times words [begin, end) of `tiles` panels.
template <int rows, int tiles>
void multiply(const Task& task, const float* x, const float* panel, const float* scale, int64_t begin, int64_t end,
              Sums sums) {
  for (int64_t group = begin / task.group_words, w = begin; w < end; ++group) {
    const int64_t group_end = task.group_end(group), stop = group_end < end ? group_end : end;
    const auto each = [&](const auto& f) __attribute__((always_inline)) {
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int t = 0; t < 2 * tiles; ++t) f(r, t, t / 2 * sums.stride + r * kTileRows + t % 2 * 8);
      }
    };
    __m256 sum[rows][2 * tiles];
    const bool first = w == group * task.group_words;
    each([&](int r, int t, int64_t) { sum[r][t] = _mm256_setzero_ps(); });
    if (!first) each([&](int r, int t, int64_t at) { sum[r][t] = _mm256_load_ps(sums.sum + at); });
    const float* a = x + 8 * (w - begin) * rows;
    const float* b = panel + 8 * (w - begin) * kTileRows;
    for (const float* last = a + 8 * (stop - w) * rows; a < last; a += rows, b += kTileRows) {
      __m256 values[2 * tiles];
#pragma GCC unroll 8
      for (int t = 0; t < 2 * tiles; ++t) values[t] = _mm256_load_ps(b + t / 2 * kPanel + t % 2 * 8);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const __m256 broadcast = _mm256_broadcast_ss(a + r);
#pragma GCC unroll 8
        for (int t = 0; t < 2 * tiles; ++t) sum[r][t] = _mm256_fmadd_ps(broadcast, values[t], sum[r][t]);
      }
    }
    if (stop == group_end) {
      each([&](int r, int t, int64_t at) {
        const float* factor = scale + (t / 2 * task.groups + group) * kTileRows + t % 2 * 8;
        const __m256 result = _mm256_fmadd_ps(_mm256_load_ps(factor), sum[r][t], _mm256_load_ps(sums.result + at));
        _mm256_store_ps(sums.result + at, result);
      });
    } else {
      each([&](int r, int t, int64_t at) { _mm256_store_ps(sums.sum + at, sum[r][t]); });
    }
    w = stop;
  }
}

// 16 results of a row to memory, except those past n.
void finish(const Fp4MatmulParams& p, int64_t row, int64_t tile, const float* result) {
  const int64_t column = tile * kTileRows, lanes = std::min(kTileRows, p.weight.n - column);
  float bias[kTileRows];
  std::fill_n(bias, kTileRows, -0.0f);  // adding it changes nothing
  if (p.bias) std::copy_n(p.bias + column, lanes, bias);
  with_dtype(p.dtype, p.out, [&]<class T>(T* all) {
    T* out = all + row * p.weight.n + column;
    T last[kTileRows];
    for (int i = 0; i < kTileRows; i += 8) {
      const __m256 value = _mm256_add_ps(_mm256_load_ps(result + i), _mm256_loadu_ps(bias + i));
      store8(lanes == kTileRows ? out + i : last + i, value);
    }
    if (lanes < kTileRows) std::copy_n(last, lanes, out);
  });
}

// A word of 8 outputs times 8 packed activations.
template <int planes>
[[gnu::always_inline]] inline void add_word(const Fp4TileLookup<planes>& lookup, const int32_t* codes, const float* x,
                                            __m256& sum) {
  asm volatile("" : "+r"(x));  // g++ would keep the activations for the next part, and runs out of registers
  const __m256i pairs = lookup.load(codes);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256 values[4];
    lookup(lookup.half(pairs, half), values);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum = _mm256_fmadd_ps(_mm256_broadcast_ss(x + 4 * half + i), values[i], sum);
  }
  settle(sum);  // one part after the other
}

// One packed row times two tiles: 4 parts of 8 outputs hide each other's latencies.
template <int planes>
void single(const Task& task, const Fp4TileLookup<planes>& lookup, int64_t tile, const float* x, const float* scale) {
  const int32_t *first = task.codes(tile), *second = task.codes(tile + 1);
  alignas(32) float result[2][kTileRows] = {};
  for (int64_t group = 0; group < task.groups; ++group) {
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;  // named: g++ keeps an array in memory
    for (int64_t w = group * task.group_words, end = task.group_end(group); w < end; ++w) {
      const int32_t *a = first + w * kTileRows, *b = second + w * kTileRows;
      _mm_prefetch(reinterpret_cast<const char*>(a + kPrefetchWords * kTileRows), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(b + kPrefetchWords * kTileRows), _MM_HINT_T0);
      add_word(lookup, a, x + 8 * w, s0);
      add_word(lookup, a + 8, x + 8 * w, s1);
      add_word(lookup, b, x + 8 * w, s2);
      add_word(lookup, b + 8, x + 8 * w, s3);
    }
    const auto fold = [&](__m256 sum, int t, int lane) {
      const __m256 factor = _mm256_load_ps(scale + (t * task.groups + group) * kTileRows + lane);
      _mm256_store_ps(result[t] + lane, _mm256_fmadd_ps(factor, sum, _mm256_load_ps(result[t] + lane)));
    };
    fold(s0, 0, 0);
    fold(s1, 0, 8);
    fold(s2, 1, 0);
    fold(s3, 1, 8);
  }
  for (int t = 0; t < kSingleTiles && tile + t < task.end; ++t) finish(task.p, 0, tile + t, result[t]);
}

// Rows [0, rows) of packed x, whose blocks of kBlockRows are `stride` floats a row apart, times the chunk of tiles.
template <int planes>
void many(const Task& task, const Fp4TileLookup<planes>& lookup, int64_t first, int64_t rows, int64_t chunk,
          const float* x, const float* scale, float* panels, const Sums& sums) {
  const int64_t tiles = std::min(kChunkTiles, task.end - chunk), stride = 8 * task.words;
  std::fill_n(sums.result, kChunkTiles * sums.stride, 0.0f);
  const int64_t rest = rows % kBlockRows, side = rest == 1 ? 4 : rest == 2 ? 2 : 1;
  for (int64_t begin = 0; begin < task.words; begin += kPanelWords) {
    const int64_t end = std::min(task.words, begin + kPanelWords);
    for (int64_t t = 0; t < ceil_div(tiles, side) * side; ++t) {
      decode(lookup, task.codes(chunk + t), begin, end, panels + t * kPanel);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const auto block = [&]<int n, int beside>(int64_t row) {
        const int64_t at = t * sums.stride + row * kTileRows;
        multiply<n, beside>(task, x + row * stride + 8 * begin * n, panels + t * kPanel,
                            scale + t * task.groups * kTileRows, begin, end,
                            {sums.sum + at, sums.result + at, sums.stride});
      };
      int64_t row = 0;
      for (; row + kBlockRows <= rows; row += kBlockRows) block.template operator()<kBlockRows, 1>(row);
      if (rest == 5) block.template operator()<5, 1>(row);
      if (rest == 4) block.template operator()<4, 1>(row);
      if (rest == 3) block.template operator()<3, 1>(row);
      if (rest == 2 && t % 2 == 0) block.template operator()<2, 2>(row);
      if (rest == 1 && t % 4 == 0) block.template operator()<1, 4>(row);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t t = 0; t < tiles; ++t) {
      finish(task.p, first + row, chunk + t, sums.result + t * sums.stride + row * kTileRows);
    }
  }
}

template <int planes>
void multiply_tiles(const Fp4MatmulParams& p, int64_t begin, int64_t end) {
  const Fp4TileLookup<planes> lookup(p.weight.table);
  const int64_t k = p.weight.k, words = word_count(k, 4);
  const int64_t group_words = p.weight.group_size > 0 ? p.weight.group_size / 8 : words;
  const Task task{p, words, ceil_div(words, group_words), group_words, end};
  const int64_t fit = (int64_t{1} << 20) / (8 * words) / kBlockRows * kBlockRows;
  const int64_t most = std::min({p.m, kPackedRows, std::max(fit, kBlockRows)});
  Scratch<float> packed(most * 8 * words + 8);
  Scratch<float> scale(kChunkTiles * task.groups * kTileRows);
  Scratch<float> panels(p.m > 1 ? kChunkTiles * kPanel : 0);
  const int64_t tile_sums = most * kTileRows;
  Scratch<float> sums(p.m > 1 ? 2 * kChunkTiles * tile_sums : 0);
  for (int64_t first = 0; first < p.m; first += most) {
    const int64_t rows = std::min(most, p.m - first);
    with_dtype(p.dtype, p.x, [&](const auto* x) {
      for (int64_t row = 0; row < rows; row += kBlockRows) {
        pack(x + (first + row) * k, k, std::min(kBlockRows, rows - row), packed + row * 8 * words);
      }
    });
    for (int64_t chunk = begin; chunk < end; chunk += kChunkTiles) {
      for (int64_t t = 0; t < kChunkTiles; ++t) {
        expand_scales(p.weight, task.groups, task.clamp(chunk + t), 1.0f, scale + t * task.groups * kTileRows);
      }
      if (p.m > 1) {
        many(task, lookup, first, rows, chunk, packed, scale, panels,
             {sums, sums + kChunkTiles * tile_sums, tile_sums});
        continue;
      }
      for (int64_t t = 0; t < kChunkTiles && chunk + t < end; t += kSingleTiles) {
        single(task, lookup, chunk + t, packed, scale + t * task.groups * kTileRows);
      }
    }
  }
}

}  // namespace

void fp4_matmul_tiles_avx2(const Fp4MatmulParams& p, int64_t begin, int64_t end) {
  are_bfloat16(p.weight.table) ? multiply_tiles<2>(p, begin, end) : multiply_tiles<4>(p, begin, end);
}

}  // namespace bitmill::detail
