// SPDX-License-Identifier: Apache-2.0
// The salient part with float activations for many rows. They are transposed to [column][32], so that a salient weight
// is one multiplication of a number with 2 vectors of rows: the work falls with the number of salient weights. Entries
// are decoded in chunks that stay in the first-level cache.
#include "salient_floats_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kBlockRows = 32;   // rows transposed together
constexpr int64_t kChunkSteps = 64;  // steps of a list, or columns, that are decoded together

// `count` values of a row from element i on, with the row's own scale and zero, to `out`.
template <bool codes, class Base>
void row_differences(const SalientWeight& w, int64_t row, int64_t i, int64_t count, const Base& base, float* out) {
  for (int64_t j = 0; j < count; j += 16) {
    const __mmask16 lanes = first_lanes(count - j);
    __m512 value;
    if constexpr (codes) {
      const __m128i bytes = _mm_maskz_loadu_epi8(lanes, static_cast<const uint8_t*>(w.value) + i + j);
      const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
      const __m512 shifted = _mm512_sub_ps(code, _mm512_set1_ps(w.value_zero[row]));
      value = _mm512_fmsub_ps(shifted, _mm512_set1_ps(w.value_scale[row]), base(j));
    } else {
      value = _mm512_sub_ps(load16(static_cast<const Float16*>(w.value) + i + j, lanes), base(j));
    }
    _mm512_storeu_ps(out + j, value);
  }
}

// Entries decoded to columns and differences: of a list [kChunkSteps][16], of a bitmap one row.
struct Chunk {
  alignas(64) int32_t column[kChunkSteps * kTileRows];
  alignas(64) float difference[kChunkSteps * kTileRows];
};
static_assert(kSegmentColumns + 64 <= kChunkSteps * kTileRows);

// Rows of activations, 32 at a time: `count` blocks of `size` = (width + 1) x 32 floats, columns first. The last column
// is 0.
struct Blocks {
  const float* x;
  int64_t size, count;
};

constexpr int64_t kSums = kTileRows * kBlockRows;  // of a tile and a block: [16][32]

// Adds `count` entries that lie `stride` apart to the 32 sums of one output. x: a block.
void add_entries(const int32_t* column, const float* difference, int64_t count, int64_t stride, const float* x,
                 float* sums) {
  __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + 16);
  for (int64_t i = 0; i < count; ++i) {
    const float* a = x + int64_t{column[i * stride]} * kBlockRows;
    const __m512 factor = _mm512_set1_ps(difference[i * stride]);
    low = _mm512_fmadd_ps(_mm512_load_ps(a), factor, low);
    high = _mm512_fmadd_ps(_mm512_load_ps(a + 16), factor, high);
  }
  _mm512_store_ps(sums, low);
  _mm512_store_ps(sums + 16, high);
}

void add_entries(const int32_t* column, const float* difference, int64_t count, int64_t stride, const Blocks& blocks,
                 int64_t lane, float* sums) {
  for (int64_t i = 0; i < blocks.count; ++i) {
    add_entries(column, difference, count, stride, blocks.x + i * blocks.size, sums + i * kSums + lane * kBlockRows);
  }
}

template <bool codes, bool grouped>
void add_list(const SalientTask& task, int64_t tile, const Blocks& blocks, const TileFactors& factors, float* sums) {
  const SalientWeight& w = task.weight;
  const __m256i last = _mm256_set1_epi16(static_cast<int16_t>(w.k - 1));
  ListStep<codes, grouped> s;
  Chunk chunk;
  for (int64_t step = w.start[tile]; step < w.start[tile + 1];) {
    int64_t steps = 0;
    for (; steps < kChunkSteps && step < w.start[tile + 1]; ++steps, ++step) {
      s.take(task, factors, step, last);
      const __m512i zeros = _mm512_set1_epi32(static_cast<int>(w.k));  // the row of zeros after the last column
      const __m512i column = _mm512_mask_cvtepu16_epi32(zeros, s.entries, s.column);
      _mm512_store_si512(chunk.column + steps * kTileRows, column);
      _mm512_store_ps(chunk.difference + steps * kTileRows, _mm512_maskz_mov_ps(s.entries, s.difference));
    }
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      add_entries(chunk.column + lane, chunk.difference + lane, steps, kTileRows, blocks, lane, sums);
    }
  }
}

struct Pair {  // 32 sums of one output; named, not an array: g++ keeps indexed accumulators in memory
  __m512 low, high;
};

void add_column(Pair& sum, float difference, __m512 low, __m512 high) {
  const __m512 factor = _mm512_set1_ps(difference);
  sum.low = _mm512_fmadd_ps(low, factor, sum.low);
  sum.high = _mm512_fmadd_ps(high, factor, sum.high);
}

// Adds `steps` columns, which all outputs have, to the sums of 4 outputs. difference: [steps][16].
void add_to_four(const float* difference, int64_t steps, const float* x, float* sums) {
  const auto load = [sums](int64_t i) {
    return Pair{_mm512_load_ps(sums + i * kBlockRows), _mm512_load_ps(sums + i * kBlockRows + 16)};
  };
  Pair s0 = load(0), s1 = load(1), s2 = load(2), s3 = load(3);
  for (int64_t i = 0; i < steps; ++i, difference += kTileRows, x += kBlockRows) {
    const __m512 low = _mm512_load_ps(x), high = _mm512_load_ps(x + 16);
    add_column(s0, difference[0], low, high);
    add_column(s1, difference[1], low, high);
    add_column(s2, difference[2], low, high);
    add_column(s3, difference[3], low, high);
  }
  const auto store = [sums](int64_t i, Pair sum) {
    _mm512_store_ps(sums + i * kBlockRows, sum.low);
    _mm512_store_ps(sums + i * kBlockRows + 16, sum.high);
  };
  store(0, s0), store(1, s1), store(2, s2), store(3, s3);
}

template <bool codes>
void add_columns(const SalientRows& rows, int64_t tile, const Blocks& blocks, const TileFactors& factors, float* sums) {
  const int32_t* values = values_of_tile<codes>(rows.task.weight, tile);
  alignas(64) float differences[kChunkSteps * kTileRows];
  for (int64_t j = 0; j < rows.width; j += kChunkSteps) {
    const int64_t steps = rows.width - j < kChunkSteps ? rows.width - j : kChunkSteps;
    for (int64_t i = 0; i < steps; ++i) {
      _mm512_store_ps(differences + i * kTileRows, column_difference<codes>(rows, values, j + i, factors));
    }
    for (int64_t i = 0; i < blocks.count; ++i) {
      const float* x = blocks.x + i * blocks.size + j * kBlockRows;
      for (int64_t lane = 0; lane < kTileRows; lane += 4) {
        add_to_four(differences + lane, steps, x, sums + i * kSums + lane * kBlockRows);
      }
    }
  }
}

template <bool codes>
void add_bitmap(const SalientTask& task, int64_t tile, const Blocks& blocks, const TileFactors& factors, float* sums) {
  const SalientWeight& w = task.weight;
  const int64_t words = word_count(w.k);
  Chunk chunk;
  for (int64_t lane = 0; lane < kTileRows && tile * kTileRows + lane < w.n; ++lane) {
    const int64_t row = tile * kTileRows + lane;
    int64_t entry = w.start[row];
    for (int64_t word = 0; word < words; word += kSegmentWords) {
      const int64_t end = word + kSegmentWords < words ? word + kSegmentWords : words;
      int64_t count = columns_of_words(w, tile, lane, word, end, chunk.column);
      if (count > w.start[row + 1] - entry) count = w.start[row + 1] - entry;  // contradictory arrays
      const auto base = [&](int64_t j) {
        if (task.groups == 1) return _mm512_set1_ps(factors.base[lane]);
        alignas(64) float each[16];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t column = j + i < count ? chunk.column[j + i] : 0;
          each[i] = factors.base[column / task.group_width * kTileRows + lane];
        }
        return _mm512_load_ps(each);
      };
      row_differences<codes>(w, row, entry, count, base, chunk.difference);
      add_entries(chunk.column, chunk.difference, count, 1, blocks, lane, sums);
      entry += count;
    }
  }
}

// `count` rows of `width` floats to [width + 1][32]; rows that are missing, and the last column, are 0.
void transpose_rows(const float* x, int64_t width, int64_t count, float* out) {
  for (int64_t column = 0; column < width; column += 16) {
    const __mmask16 lanes = first_lanes(width - column);
    for (int64_t row = 0; row < kBlockRows; row += 4) {
      __m512 z[4];
      for (int i = 0; i < 4; ++i) {
        z[i] = row + i < count ? _mm512_maskz_loadu_ps(lanes, x + (row + i) * width + column) : _mm512_setzero_ps();
      }
      transpose4(z);
      for (int i = 0; i < 4; ++i) {
        alignas(64) float four[16];
        _mm512_store_ps(four, z[i]);
        for (int part = 0; part < 4; ++part) {
          if (column + 4 * part + i < width) {
            _mm_store_ps(out + (column + 4 * part + i) * kBlockRows + row, _mm_load_ps(four + 4 * part));
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < kBlockRows; ++i) out[width * kBlockRows + i] = 0.0f;
}

template <bool codes>
void add_tile(const SalientRows& rows, int64_t tile, const Blocks& blocks, const TileFactors& factors, float* sums) {
  const SalientTask& task = rows.task;
  switch (task.weight.encoding) {
    case SalientEncoding::list:
      if (task.groups == 1) return add_list<codes, false>(task, tile, blocks, factors, sums);
      return add_list<codes, true>(task, tile, blocks, factors, sums);
    case SalientEncoding::columns:
      return add_columns<codes>(rows, tile, blocks, factors, sums);
    default:
      return add_bitmap<codes>(task, tile, blocks, factors, sums);
  }
}

template <bool codes>
void multiply(const SalientRows& rows, int64_t begin, int64_t end, TileFactors& factors) {
  const SalientTask& task = rows.task;
  const int64_t size = (rows.width + 1) * kBlockRows, all = ceil_div(task.m, kBlockRows);
  const int64_t most = blocks_together(size * int64_t{sizeof(float)}), together = most < all ? most : all;
  Scratch<float> x(together * size, 0);
  Scratch<float> sums(together * kSums, 0);
  for (int64_t row = 0; row < task.m; row += together * kBlockRows) {
    const int64_t left = ceil_div(task.m - row, kBlockRows);
    const Blocks blocks{x, size, left < together ? left : together};
    const int64_t last = row + together * kBlockRows < task.m ? row + together * kBlockRows : task.m;
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t first = row + i * kBlockRows, count = last - first < kBlockRows ? last - first : kBlockRows;
      transpose_rows(rows.x + first * rows.width, rows.width, count, x + i * size);
    }
    for (int64_t tile = begin; tile < end; ++tile) {
      factors.load(task, tile);
      for (int64_t i = 0; i < blocks.count * kSums; ++i) sums[i] = 0.0f;
      add_tile<codes>(rows, tile, blocks, factors, sums);
      for (int64_t first = row; first < last; first += 16) {
        const int64_t i = first - row, count = last - first < 16 ? last - first : 16;
        const float* from = sums + i / kBlockRows * kSums + i % kBlockRows;
        finish_rows(task, first, count, tile, from, kBlockRows, factors, rows.totals + first * task.groups);
      }
    }
  }
}

}  // namespace

void salient_many_rows_avx512(const SalientRows& rows, int64_t begin, int64_t end, TileFactors factors) {
  rows.task.weight.value_scale ? multiply<true>(rows, begin, end, factors) : multiply<false>(rows, begin, end, factors);
}

}  // namespace bitmill::detail
