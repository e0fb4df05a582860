// SPDX-License-Identifier: Apache-2.0
// int8 activations times FP4 weights whose 16 values are integers: vpshufb decodes 32 codes to unsigned bytes, value
// plus an offset, and vpmaddubsw multiplies them with 4 columns of activations. Each 16-bit lane adds up half of the
// columns of a chunk, so few that the sum without the offset is within 16 bits; it begins with what the offset adds to
// it, negated, and may leave 16 bits meanwhile, since additions wrap. A tile is decoded once for a block of rows.
#include <algorithm>
#include <cstring>

#include "fp4_matmul.h"
#include "fp4_scales_avx2.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kBlockRows = 64;      // of activations, that share a decoded tile
constexpr int64_t kPanelRows = 16;      // from so many on
constexpr int64_t kSpanColumns = 512;   // of a tile, that are decoded together: 8 KiB
constexpr int64_t kPrefetchWords = 64;  // 4 KiB ahead
constexpr int64_t kWordBytes = 128;     // a decoded word of 16 outputs: columns 0, 2, 4, 6 of them, then 1, 3, 5, 7

// 16 outputs of a row: what the chunks of a group have added up to, and the groups before.
struct Kept {
  __m256i dot_a, dot_b;
  __m256 sum_a, sum_b;
};

struct Task {
  const Fp4MatmulParams& p;
  __m256i table;                        // values plus offset, twice
  int64_t words, groups, group_chunks;  // of the weight
  int64_t rows, chunks, width;          // of a block of rows; `width` bytes a row
  Scratch<int8_t> q;                    // [rows][width]: each 8 columns as 0, 2, 4, 6, 1, 3, 5, 7
  Scratch<int32_t> start;               // [chunks][rows]: two 16-bit sums
  Scratch<float> row_scale;             // [groups][rows] or nothing
  Scratch<float> scale;                 // [groups][16], of a tile, times unit
  Scratch<Kept> kept;                   // [rows]
};

// Rows of activations, padded with zeros, and the sums that their chunks of `words` words begin with.
template <int words>
void arrange(const Task& task, int64_t row, int64_t count, int offset) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  const __m256i each = _mm256_set1_epi8(static_cast<char>(offset)), zero = _mm256_setzero_si256();
  const int64_t k = task.p.weight.k;
  for (int64_t i = 0; i < count; ++i) {
    int8_t* q = task.q + i * task.width;
    std::memcpy(q, static_cast<const int8_t*>(task.p.x) + (row + i) * k, static_cast<size_t>(k));
    std::memset(q + k, 0, static_cast<size_t>(task.width - k));
    for (int64_t group = 0; task.p.grouped_rows && group < task.groups; ++group) {
      task.row_scale[group * task.rows + i] = task.p.row_scale[(row + i) * task.groups + group];
    }
    for (int64_t j = 0, chunk = 0; j < task.width; j += 32) {
      const __m256i columns = _mm256_shuffle_epi8(load_bits(q + j), order);
      store_bits(q + j, columns);
      __m256i sums = _mm256_sub_epi16(zero, _mm256_maddubs_epi16(each, columns));
      sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0xB1));
      if constexpr (words > 1) sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0x4E));
      if constexpr (words > 2) sums = _mm256_add_epi16(sums, _mm256_permute4x64_epi64(sums, 0x4E));
      alignas(32) int32_t pairs[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), sums);
      for (int c = 0; c < 4 / words && chunk < task.chunks; ++c, ++chunk) {
        task.start[chunk * task.rows + i] = pairs[2 * words * c];
      }
    }
  }
}

struct Values {  // 4 columns of 16 outputs
  __m256i a, b;
};

// Weights as they are stored, for few rows.
struct Codes {
  const int32_t* tile;
  __m256i table;

  Values operator()(int64_t word, int half) const {
    if (half == 0) _mm_prefetch(reinterpret_cast<const char*>(tile + (word + kPrefetchWords) * kTileRows), _MM_HINT_T0);
    const auto values = [&](int i) {
      const __m256i codes = load_bits(tile + word * kTileRows + i);
      const __m256i low = half == 0 ? codes : _mm256_srli_epi32(codes, 4);
      return _mm256_shuffle_epi8(table, _mm256_and_si256(low, _mm256_set1_epi8(15)));
    };
    return {values(0), values(8)};
  }
  void advance(int64_t words) { tile += words * kTileRows; }
};

// Decoded weights.
struct Panel {
  const uint8_t* bytes;  // of word 0

  Values operator()(int64_t word, int half) const {
    const uint8_t* at = bytes + word * kWordBytes + half * kWordBytes / 2;
    return {load_bits(at), load_bits(at + kWordBytes / 4)};
  }
  void advance(int64_t words) { bytes += words * kWordBytes; }
};

void decode(const Codes& codes, int64_t words, int64_t first, int64_t last, uint8_t* panel) {
  for (int64_t word = first; word < last; ++word) {
    for (int half = 0; half < 2; ++half, panel += kWordBytes / 2) {
      const Values values = codes(word < words ? word : words - 1, half);  // past the last word activations are 0
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel), values.a);
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel + kWordBytes / 4), values.b);
    }
  }
}

struct Sums {  // 16 bits each, two of them for an output; named, not an array: g++ keeps indexed ones in memory
  __m256i a, b;
};

void step(Sums& sums, const int8_t* q, const Values& w) {
  const __m256i x = broadcast(q);
  sums.a = _mm256_add_epi16(sums.a, _mm256_maddubs_epi16(w.a, x));
  settle(sums.a);  // keeps product and addition together; otherwise g++ runs out of registers
  sums.b = _mm256_add_epi16(sums.b, _mm256_maddubs_epi16(w.b, x));
  settle(sums.b);
}

// Adds a group's dots, as floats. `row_scale` is used if every group of a row has its own.
template <bool grouped>
void fold(Kept& kept, __m256i dot_a, __m256i dot_b, const float* scale, const float* row_scale) {
  const auto term = [&](int i, __m256i dot) {
    __m256 total = _mm256_cvtepi32_ps(dot);
    if constexpr (grouped) total = _mm256_mul_ps(_mm256_broadcast_ss(row_scale), total);
    return _mm256_mul_ps(_mm256_loadu_ps(scale + i), total);
  };
  kept.sum_a = _mm256_add_ps(kept.sum_a, term(0, dot_a));
  kept.sum_b = _mm256_add_ps(kept.sum_b, term(8, dot_b));
}

__m256i dots_of(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

void add_chunk(Kept& kept, const Sums& sums) {
  kept.dot_a = _mm256_add_epi32(kept.dot_a, dots_of(sums.a));
  kept.dot_b = _mm256_add_epi32(kept.dot_b, dots_of(sums.b));
}

template <bool grouped>
void end_group(Kept& kept, const float* scale, const float* row_scale) {
  fold<grouped>(kept, kept.dot_a, kept.dot_b, scale, row_scale);
  kept.dot_a = kept.dot_b = _mm256_setzero_si256();
}

template <bool grouped>
void add_whole(Kept& kept, const Sums& sums, const float* scale, const float* row_scale) {
  fold<grouped>(kept, dots_of(sums.a), dots_of(sums.b), scale, row_scale);
}

// Chunks [first, last) of `rows` rows from row `at` of the block on. `whole`: a chunk is a group.
template <int rows, int words, bool grouped, bool whole, class Weights>
[[gnu::noinline]] void multiply(const Task& task, Weights weights, int64_t at, int64_t first, int64_t last) {
  static_assert(rows == 1 || rows == 4);
  const int64_t next = rows > 1 ? task.width : 0;
  const int8_t* q0 = task.q + at * task.width + first * words * 8;
  const int8_t *q1 = q0 + next, *q2 = q1 + next, *q3 = q2 + next;
  const int32_t* start = task.start + first * task.rows + at;
  int64_t group = whole ? first : first / task.group_chunks;
  int64_t left = (group + 1) * task.group_chunks - first;  // chunks of the group
  const float* scale = task.scale + group * kTileRows;
  const float* row_scale = grouped ? task.row_scale + group * task.rows + at : nullptr;
  Kept* const kept = task.kept + at;
  Kept only = kept[0];  // a single row stays in registers
  Kept& k0 = rows == 1 ? only : kept[0];
  for (int64_t chunk = first; chunk < last; ++chunk, start += task.rows) {
    const auto begin = [&](int i) {
      const __m256i pairs = broadcast(start + i);
      return Sums{pairs, pairs};
    };
    Sums r0 = begin(0), r1, r2, r3;
    if constexpr (rows > 1) r1 = begin(1), r2 = begin(2), r3 = begin(3);
#pragma GCC unroll 4
    for (int word = 0; word < words; ++word) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Values w = weights(word, half);
        const int column = 8 * word + 4 * half;
        step(r0, q0 + column, w);
        if constexpr (rows > 1) {
          step(r1, q1 + column, w);
          step(r2, q2 + column, w);
          step(r3, q3 + column, w);
        }
      }
    }
    weights.advance(words);
    q0 += 8 * words, q1 += 8 * words, q2 += 8 * words, q3 += 8 * words;
    asm("" : "+r"(q1), "+r"(q2), "+r"(q3));  // four pointers; otherwise g++ keeps distances from q0
    if constexpr (whole) {
      add_whole<grouped>(k0, r0, scale, row_scale);
      if constexpr (rows > 1) {
        add_whole<grouped>(kept[1], r1, scale, row_scale + 1);
        add_whole<grouped>(kept[2], r2, scale, row_scale + 2);
        add_whole<grouped>(kept[3], r3, scale, row_scale + 3);
      }
    } else {
      add_chunk(k0, r0);
      if constexpr (rows > 1) add_chunk(kept[1], r1), add_chunk(kept[2], r2), add_chunk(kept[3], r3);
      if (--left > 0 && chunk + 1 < task.chunks) continue;
      left = task.group_chunks;
      end_group<grouped>(k0, scale, row_scale);
      for (int i = 1; i < rows; ++i) end_group<grouped>(kept[i], scale, row_scale + i);
    }
    scale += kTileRows;
    if constexpr (grouped) row_scale += task.rows;
  }
  if constexpr (rows == 1) kept[0] = only;
}

// Kept sums to results.
void finish(const Task& task, int64_t row, int64_t tile, const Kept& kept) {
  const Fp4MatmulParams& p = task.p;
  const int64_t column = tile * kTileRows, count = std::min(kTileRows, p.weight.n - column);
  float value[kTileRows], bias[kTileRows];
  for (int i = 0; i < kTileRows; ++i) bias[i] = -0.0f;  // x + -0 is x, for every x
  if (p.bias) std::memcpy(bias, p.bias + column, static_cast<size_t>(count) * sizeof(float));
  const float factor = p.grouped_rows ? 1.0f : p.row_scale[row];  // times 1 is exact
  _mm256_storeu_ps(value, kept.sum_a);
  _mm256_storeu_ps(value + 8, kept.sum_b);
  for (int i = 0; i < kTileRows; ++i) value[i] = value[i] * factor + bias[i];
  with_dtype(p.dtype, p.out, [&]<class T>(T* out) {
    T results[kTileRows];
    for (int i = 0; i < kTileRows; i += 8) store8(results + i, _mm256_loadu_ps(value + i));
    std::memcpy(out + row * p.weight.n + column, results, static_cast<size_t>(count) * sizeof(T));
  });
}

template <int words, bool grouped, bool whole>
void multiply_tiles(const Task& task, const Fp4Integers& integers, int offset, int64_t begin, int64_t end) {
  const Fp4MatmulParams& p = task.p;
  constexpr int64_t kSpan = kSpanColumns / (8 * words);
  alignas(64) uint8_t panel[kSpanColumns * kTileRows];
  for (int64_t row = 0; row < p.m; row += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, p.m - row);
    arrange<words>(task, row, rows, offset);
    for (int64_t tile = begin; tile < end; ++tile) {
      const Codes codes{p.weight.tiles + tile * task.words * kTileRows, task.table};
      expand_scales(p.weight, task.groups, tile, integers.unit, task.scale);
      std::fill_n(task.kept.get(), rows, Kept{});
      const auto multiply_rows = [&](const auto& weights, int64_t first, int64_t last) {
        int64_t i = 0;
        for (; i + 4 <= rows; i += 4) multiply<4, words, grouped, whole>(task, weights, i, first, last);
        for (; i < rows; ++i) multiply<1, words, grouped, whole>(task, weights, i, first, last);
      };
      int64_t first = 0;
      if (rows < kPanelRows) {  // decoded on the way, but for a chunk that the words do not fill
        first = task.words / words;
        multiply_rows(codes, 0, first);
      }
      for (; first < task.chunks; first += kSpan) {
        const int64_t last = std::min(first + kSpan, task.chunks);
        decode(codes, task.words, first * words, last * words, panel);
        multiply_rows(Panel{panel}, first, last);
      }
      for (int64_t i = 0; i < rows; ++i) finish(task, row + i, tile, task.kept[i]);
    }
  }
}

}  // namespace

void fp4_int8_matmul_tiles_avx2(const Fp4MatmulParams& p, const Fp4Integers& integers, int64_t begin, int64_t end) {
  const Fp4Weight& w = p.weight;
  int offset = 0, largest = 0;
  for (const int8_t value : integers.value) {
    offset = std::max(offset, -value);
    largest = std::max(largest, std::abs(int{value}));
  }
  // A product of two columns, 2 x 128 x 127, is within 16 bits, and so is half of the smallest chunk, 4 x 64 x 127.
  if (largest > 64) return fp4_int8_matmul_tiles_generic(p, integers, begin, end);
  const int64_t words = word_count(w.k, 4), group_words = w.group_size > 0 ? w.group_size / 8 : words;
  const int64_t groups = ceil_div(words, group_words);
  const auto fits = [&](int size) {
    return size * 4 * largest * 127 < 1 << 15 && (groups == 1 || group_words % size == 0);
  };
  const int size = fits(4) ? 4 : fits(2) ? 2 : 1;
  const int64_t chunks = ceil_div(words, size), width = ceil_div(words, 4) * 32;
  alignas(16) uint8_t table[16];
  for (int i = 0; i < 16; ++i) table[i] = static_cast<uint8_t>(integers.value[i] + offset);
  const int64_t rows = std::min(p.m, kBlockRows);
  const Task task{p,
                  _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))),
                  words,
                  groups,
                  ceil_div(group_words, size),
                  rows,
                  chunks,
                  width,
                  Scratch<int8_t>(rows * width),
                  Scratch<int32_t>(rows * chunks),
                  Scratch<float>(p.grouped_rows ? rows * groups : 0),
                  Scratch<float>(groups * kTileRows),
                  Scratch<Kept>(rows)};
  const auto run = [&]<int size, bool grouped>() {
    group_words == size ? multiply_tiles<size, grouped, true>(task, integers, offset, begin, end)
                        : multiply_tiles<size, grouped, false>(task, integers, offset, begin, end);
  };
  const auto run_size = [&]<int size>() {
    p.grouped_rows ? run.template operator()<size, true>() : run.template operator()<size, false>();
  };
  size == 4   ? run_size.template operator()<4>()
  : size == 2 ? run_size.template operator()<2>()
              : run_size.template operator()<1>();
}

}  // namespace bitmill::detail
