// SPDX-License-Identifier: Apache-2.0
// The salient part of a list or a bitmap with float activations for many rows: a salient weight is one multiplication
// of its difference with 4 vectors of rows.
#include "salient_many_rows_avx2.h"

#include "salient_floats_avx2.h"

namespace bitmill::detail {
namespace {

struct Pair {  // 8 sums of one output; named, not an array: g++ keeps indexed accumulators in memory
  __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();

  void add_to(float* sums) const {
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), _mm256_add_ps(even, odd)));
  }
};

void add(__m256& sum, const float* x, __m256 factor) { sum = _mm256_fmadd_ps(_mm256_loadu_ps(x), factor, sum); }

// `count` values of a row from element i on, with the row's own scale and zero, less the base, to `out`, which has room
// for 8 more.
template <bool codes>
void row_differences(const SalientWeight& w, int64_t i, int64_t count, __m256 base, __m256 scale, __m256 zero,
                     float* out) {
  for (int64_t j = 0; j < count; j += 8) {
    const int64_t left = w.entries - (i + j), size = codes ? 1 : 2;
    uint16_t last[8] = {};
    const char* from = static_cast<const char*>(w.value) + (i + j) * size;
    if (left < 8) {
      __builtin_memcpy(last, from, static_cast<size_t>(left * size));
      from = reinterpret_cast<const char*>(last);
    }
    _mm256_storeu_ps(out + j, difference<codes>(load_values<codes>(from, 0), base, scale, zero));
  }
}

template <bool codes, bool grouped>
int64_t decode_steps(const SalientTask& task, Walk& walk, Chunk<float>& chunk) {
  int64_t steps = 0;
  for (; steps < kListSteps && walk.step < walk.end; ++steps, ++walk.step) {
    uint16_t* column = chunk.column + steps * kTileRows;
    const Outputs found = take_step<codes, grouped>(task, walk.factors, walk.step, walk.list, column);
    store_outputs(chunk.value + steps * kTileRows, found);
  }
  return steps;
}

template <bool codes>
struct Floats {
  using Input = float;
  using Element = float;
  using Sum = float;
  using Entries = Chunk<float>;
  static constexpr int kVector = 8;
  static constexpr int64_t kSums = kTileRows * kBlockRows;  // [16][32]

  // Adds entries to the sums of one output. x: [column][width].
  template <int width, int stride>
  static void add_entries(const uint16_t* column, const float* value, int64_t count, const float* x, float* sums) {
    Pair s0, s1, s2, s3;
    const auto at = [x](uint16_t c) { return x + int64_t{c} * width; };
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      const float *a = at(column[i * stride]), *b = at(column[(i + 1) * stride]);
      const __m256 even = _mm256_broadcast_ss(value + i * stride);
      const __m256 odd = _mm256_broadcast_ss(value + (i + 1) * stride);
      add(s0.even, a, even), add(s0.odd, b, odd);
      if constexpr (width > 8) add(s1.even, a + 8, even), add(s1.odd, b + 8, odd);
      if constexpr (width > 16) {
        add(s2.even, a + 16, even), add(s2.odd, b + 16, odd);
        add(s3.even, a + 24, even), add(s3.odd, b + 24, odd);
      }
    }
    if (i < count) {
      const float* a = at(column[i * stride]);
      const __m256 even = _mm256_broadcast_ss(value + i * stride);
      add(s0.even, a, even);
      if constexpr (width > 8) add(s1.even, a + 8, even);
      if constexpr (width > 16) add(s2.even, a + 16, even), add(s3.even, a + 24, even);
    }
    s0.add_to(sums);
    if constexpr (width > 8) s1.add_to(sums + 8);
    if constexpr (width > 16) s2.add_to(sums + 16), s3.add_to(sums + 24);
  }

  static void decode_list(const SalientTask& task, Walk& walk, Entries& chunk) {
    const auto decode = task.groups == 1 ? decode_steps<codes, false> : decode_steps<codes, true>;
    const int64_t steps = decode(task, walk, chunk);
    for (int64_t lane = 0; lane < kTileRows; ++lane) chunk.first[lane] = lane, chunk.count[lane] = steps;
  }

  static void decode_bitmap(const SalientTask& task, int64_t tile, int64_t begin, int64_t end, Walk& walk,
                            Entries& chunk) {
    const SalientWeight& w = task.weight;
    const int64_t group_words = task.groups == 1 ? end : task.group_width / 32;
    int64_t size = 0;
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      chunk.first[lane] = size;
      if (lane < outputs_of_tile(w, tile)) {
        const __m256 scale = _mm256_set1_ps(walk.factors.scale[lane]), zero = _mm256_set1_ps(walk.factors.zero[lane]);
        int64_t& entry = walk.entry[lane];
        for (int64_t word = begin; word < end;) {  // what lies in one group
          const int64_t group = word / group_words, next = (group + 1) * group_words, stop = next < end ? next : end;
          int64_t count = columns_of_words(w, tile, lane, word, stop, 32 * begin, chunk.column + size);
          const int64_t left = w.start[tile * kTileRows + lane + 1] - entry;
          if (count > left) count = left;  // contradictory arrays
          const __m256 base = _mm256_set1_ps(walk.factors.base[group * kTileRows + lane]);
          row_differences<codes>(w, entry, count, base, scale, zero, chunk.value + size);
          entry += count, size += count, word = stop;
        }
      }
      chunk.count[lane] = size - chunk.first[lane];
    }
  }

  // `count` rows of `width` floats to [width][stride]; rows that are missing are 0.
  static void transpose(const float* x, int64_t width, int64_t count, int64_t stride, float* out) {
    for (int64_t row = 0; row < stride; row += 8) {
      for (int64_t column = 0; column < width; column += 8) {
        const int64_t columns = width - column < 8 ? width - column : 8;
        const __m256i there =
            _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(columns)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        __m256 v[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const float* from = x + (row + i) * width + column;
          v[i] = row + i < count ? _mm256_maskload_ps(from, there) : _mm256_setzero_ps();
        }
        transpose8(v);
        float* to = out + column * stride + row;
        if (columns == 8) {
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * stride, v[i]);
        } else {
          alignas(32) float last[8][8];
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) _mm256_store_ps(last[i], v[i]);
          for (int64_t i = 0; i < columns; ++i) _mm256_storeu_ps(to + i * stride, _mm256_load_ps(last[i]));
        }
      }
    }
  }

  static __m256 eight_rows(const float* sums, int64_t lane, const TileFactors&) {
    return _mm256_loadu_ps(sums + lane * kBlockRows);
  }
};

}  // namespace

void salient_many_rows_avx2(const SalientFloatRows& rows, int64_t begin, int64_t end) {
  const bool codes = rows.task.weight.value_scale;
  const auto multiply = codes ? multiply_transposed<Floats<true>> : multiply_transposed<Floats<false>>;
  multiply(rows.task, rows.x, rows.totals, begin, end);
}

}  // namespace bitmill::detail
