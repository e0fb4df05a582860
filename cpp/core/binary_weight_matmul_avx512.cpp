// SPDX-License-Identifier: Apache-2.0
// Float activations times 1-bit weights by table lookup: for every 4 columns of an activation row a table of the 16
// sums +-a0 +-a1 +-a2 +-a3 sits in one register, and vpermps fetches for 16 outputs at once what their 4 weight bits
// select. 4 rows share the shifted bits of 2 tiles; a single row takes 8 tiles. Exact float32 activations.
#include "avx512.h"
#include "binary_matmul.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kTables = 8;                  // tables a word of 32 columns
constexpr int64_t kTableFloats = 16 * kTables;  // floats of tables a word

// The tables of one activation row, [words][8][16] floats. What padding bits select past k is -0, which adds nothing.
template <class T>
void build_tables(const T* x, int64_t k, float* tables) {
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i minus[4];  // the sign bit where bit i of the lane's number is 0
  for (int i = 0; i < 4; ++i) {
    minus[i] = _mm512_maskz_mov_epi32(_mm512_testn_epi32_mask(lane, _mm512_set1_epi32(1 << i)), sign);
  }
  for (int64_t column = 0; column < k; column += 16) {
    alignas(64) float a[16];
    _mm512_store_ps(a, load16(x + column, first_lanes(k - column)));
    for (int table = 0; table < 4; ++table) {
      const auto term = [&](int i) {
        return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(_mm512_set1_ps(a[4 * table + i])), minus[i]));
      };
      const __m512 sums = _mm512_add_ps(_mm512_add_ps(term(0), term(1)), _mm512_add_ps(term(2), term(3)));
      _mm512_storeu_ps(tables + 4 * column + 16 * table, sums);
    }
  }
  if (k % 32 != 0 && k % 32 <= 16) {  // the upper half of the last word
    for (int table = 0; table < 4; ++table) {
      _mm512_storeu_ps(tables + (k / 32) * kTableFloats + 16 * (4 + table), _mm512_set1_ps(-0.0f));
    }
  }
}

struct Task {
  const BinaryWeightMatmulParams& p;
  int64_t words, groups, group_words;
  int64_t end;  // the first tile that belongs to somebody else
};

template <class T>
void finish(const Task& task, int64_t row, int64_t tile, __m512 value) {
  const BinaryWeightMatmulParams& p = task.p;
  const int64_t column = tile * kTileRows;
  const __mmask16 lanes = first_lanes(p.n - column);
  if (p.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, p.bias + column));
  store16(static_cast<T*>(p.out) + row * p.n + column, lanes, value);
}

__m512 load_scale(const Task& task, int64_t tile, int64_t group) {
  const int64_t column = tile * kTileRows;
  const __mmask16 lanes = first_lanes(task.p.n - column);
  if (task.groups == 1) return _mm512_maskz_loadu_ps(lanes, task.p.scale + column);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(task.groups)));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, index, task.p.scale + column * task.groups + group, 4);
}

// `rows` rows from their tables times `tiles` tiles side by side. Tiles past the end repeat the last one, unstored.
template <class T, int rows, int tiles>
void block(const Task& task, int64_t row, int64_t tile, const float* tables) {
  const int64_t last = task.end - 1;
  const int32_t* weight[tiles];
  for (int t = 0; t < tiles; ++t) {
    weight[t] = task.p.weight + (tile + t < last ? tile + t : last) * task.words * kTileRows;
  }
  const __m512 one = _mm512_set1_ps(1.0f);
  float partial[rows][tiles][kTileRows];  // from group to group
  for (int64_t group = 0; group < task.groups; ++group) {
    __m512 sum[rows][tiles];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) sum[r][t] = _mm512_setzero_ps();
    }
    const int64_t begin = group * task.group_words;
    const int64_t end = begin + task.group_words < task.words ? begin + task.group_words : task.words;
    for (int64_t w = begin; w < end; ++w) {
      __m512i bits[tiles];
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) {
        bits[t] = _mm512_loadu_si512(weight[t] + w * kTileRows);
        if constexpr (rows == 1)
          _mm_prefetch(reinterpret_cast<const char*>(weight[t] + (w + 24) * kTileRows), _MM_HINT_T0);
      }
#pragma GCC unroll 2
      for (int j = 0; j < kTables; ++j) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const __m512 table = _mm512_loadu_ps(tables + (r * task.words + w) * kTableFloats + 16 * j);
#pragma GCC unroll 8
          for (int t = 0; t < tiles; ++t) {
            const __m512 term = _mm512_permutexvar_ps(bits[t], table);
            // The same sum on two kinds of units: additions alone would wait for those that the lookups need.
            sum[r][t] = t % 2 == 0 ? _mm512_add_ps(sum[r][t], term) : _mm512_fmadd_ps(term, one, sum[r][t]);
          }
        }
#pragma GCC unroll 8
        for (int t = 0; t < tiles; ++t) bits[t] = _mm512_srli_epi32(bits[t], 4);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tiles; ++t) {
      const __m512 scale = load_scale(task, tile + t < last ? tile + t : last, group);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        __m512 value = _mm512_mul_ps(scale, sum[r][t]);
        value = _mm512_add_ps(group > 0 ? _mm512_loadu_ps(partial[r][t]) : _mm512_setzero_ps(), value);
        if (group + 1 < task.groups) {
          _mm512_storeu_ps(partial[r][t], value);
        } else if (tile + t < task.end) {
          finish<T>(task, row + r, tile + t, value);
        }
      }
    }
  }
}

template <class T>
void multiply(const Task& task, int64_t begin, const T* x) {
  const BinaryWeightMatmulParams& p = task.p;
  float* tables = new (std::align_val_t{64}) float[4 * task.words * kTableFloats];
  int64_t row = 0;
  for (; row + 4 <= p.m; row += 4) {
    for (int r = 0; r < 4; ++r) build_tables(x + (row + r) * p.k, p.k, tables + r * task.words * kTableFloats);
    for (int64_t tile = begin; tile < task.end; tile += 2) block<T, 4, 2>(task, row, tile, tables);
  }
  for (; row < p.m; ++row) {
    build_tables(x + row * p.k, p.k, tables);
    for (int64_t tile = begin; tile < task.end; tile += 8) block<T, 1, 8>(task, row, tile, tables);
  }
  ::operator delete[](tables, std::align_val_t{64});
}

}  // namespace

void binary_weight_matmul_tiles_avx512(const BinaryWeightMatmulParams& p, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  const int64_t group_words = p.group_size > 0 ? p.group_size / 32 : words;
  const Task task{p, words, ceil_div(words, group_words), group_words, end};
  with_dtype(p.dtype, p.x, [&](const auto* x) { multiply(task, begin, x); });
}

}  // namespace bitmill::detail
