// SPDX-License-Identifier: Apache-2.0
// int8 activations times bits by table lookup with AVX2. A nibble of a weight chooses one of the 16 sums that 4 columns
// of activations can have; 32 outputs are one vpshufb for the lowest 5 bits of their sums and one for the others, so
// that a word of 8 nibbles adds up within bytes: 128 products are 4 instructions, against 8 of vpmaddubsw with bits
// spread to bytes. A sum is that of the columns whose bits are set, plus the magnitudes of all negative ones, so it is
// not negative: from their total over some columns, dot = 2 total - sum of |q|. Tables are made once for a block of
// rows, nibbles once for a block of outputs, a span of columns and those rows.
#include <algorithm>
#include <cstring>

#include "avx2.h"
#include "binary_int8_matmul.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int kTiles = 4;  // side by side: two vectors of 32 nibbles
constexpr int64_t kColumns = kTiles * kTileRows;
constexpr int64_t kSpanWords = 16;                 // 32 x 16 x 127 < 2^16
constexpr int64_t kTableBytes = 32;                // of 4 columns: 16 times the lowest 5 bits, 16 times the others
constexpr int64_t kWordTables = 8 * kTableBytes;   // of the columns of a word
constexpr int64_t kBlockTables = 3 << 17;          // a block of rows has about so many bytes of tables, in L2
constexpr int64_t kMostRows = 64, kLeastRows = 8;  // of a block

// 64 outputs of a row: what the spans of a group have added up to, and the groups before.
struct alignas(64) Kept {
  int32_t dot[kColumns];
  float sum[kColumns];
};

struct Task {
  const BinaryInt8MatmulParams& p;
  int64_t words, groups, group_words;
  int64_t end;                 // the first tile that belongs to somebody else
  Scratch<uint8_t> table;      // [rows][words][8][kTableBytes]
  Scratch<int32_t> magnitude;  // [rows][words + 1]: the sum of |q| over the words before
  Scratch<uint8_t> nibbles;    // [kSpanWords][8][kColumns], of a block of outputs
  Scratch<uint16_t> total;     // [2][kColumns]: of two rows, in a span
  Scratch<Kept> kept;          // [rows]
};

// The tables of a word, from its 32 columns; answers the sum of |q|.
int32_t make_tables(const int8_t* q, uint8_t* table) {
  const __m256i zero = _mm256_setzero_si256(), columns = load_bits(q);
  const __m256i negative = _mm256_max_epi8(_mm256_sub_epi8(zero, columns), zero);
  const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(negative, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
  alignas(32) int32_t least[8];  // twice 16 bits: the magnitudes of the negative ones of 4 columns
  store_bits(least, _mm256_or_si256(fours, _mm256_slli_epi32(fours, 16)));
  const __m256i first = _mm256_set1_epi16(0x0100), second = _mm256_set1_epi16(0x0302);
  // Entry i: bits 0 and 1, bits 2 and 3 of i.
  const __m256i low = _mm256_setr_epi16(0, 1, 256, 257, 0, 1, 256, 257, 0, 1, 256, 257, 0, 1, 256, 257);
  const __m256i high = _mm256_setr_epi16(0, 0, 0, 0, 1, 1, 1, 1, 256, 256, 256, 256, 257, 257, 257, 257);
  for (int i = 0; i < 8; ++i) {
    const __m256i x = broadcast(q + 4 * i);
    const __m256i a = _mm256_maddubs_epi16(low, _mm256_shuffle_epi8(x, first));
    const __m256i b = _mm256_maddubs_epi16(high, _mm256_shuffle_epi8(x, second));
    const __m256i sum = _mm256_add_epi16(_mm256_add_epi16(a, b), broadcast(least + i));
    const __m256i lowest = _mm256_and_si256(sum, _mm256_set1_epi16(31)), others = _mm256_srli_epi16(sum, 5);
    store_bits(table + i * kTableBytes, _mm256_permute4x64_epi64(_mm256_packus_epi16(lowest, others), 0xD8));
  }
  const __m256i sums = _mm256_sad_epu8(_mm256_abs_epi8(columns), zero);
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E)));
}

void make_tables(const Task& task, int64_t row, int64_t count) {
  const int64_t k = task.p.k;
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* q = task.p.q + (row + i) * k;
    uint8_t* table = task.table + i * task.words * kWordTables;
    int32_t* magnitude = task.magnitude + i * (task.words + 1);
    int32_t before = 0;
    for (int64_t w = 0; w < task.words; ++w, table += kWordTables) {
      magnitude[w] = before;
      if (32 * (w + 1) <= k) {
        before += make_tables(q + 32 * w, table);
        continue;
      }
      int8_t last[32] = {};
      std::memcpy(last, q + 32 * w, static_cast<size_t>(k - 32 * w));
      before += make_tables(last, table);
    }
    magnitude[task.words] = before;
  }
}

void split_tiles(const Task& task, int64_t tile, int64_t first, int64_t last) {
  const auto at = [&](int64_t t) { return task.p.weight + (t < task.end ? t : task.end - 1) * task.words * kTileRows; };
  const int32_t *w0 = at(tile), *w1 = at(tile + 1), *w2 = at(tile + 2), *w3 = at(tile + 3);
  uint8_t* nibbles = task.nibbles;
  for (int64_t w = first * kTileRows; w < last * kTileRows; w += kTileRows, nibbles += 8 * kColumns) {
    split_nibbles(w0 + w, w1 + w, nibbles, kColumns);
    split_nibbles(w2 + w, w3 + w, nibbles + 32, kColumns);
  }
}

struct Row {  // bytes of 2 x 32 outputs; named, not an array: g++ keeps an indexed array of accumulators in memory
  __m256i low0, high0, low1, high1;
};

void look_up(Row& row, const uint8_t* table, __m256i i0, __m256i i1) {
  const auto half = [&](int i) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + i)));
  };
  const __m256i low = half(0);
  row.low0 = _mm256_add_epi8(row.low0, _mm256_shuffle_epi8(low, i0));
  row.low1 = _mm256_add_epi8(row.low1, _mm256_shuffle_epi8(low, i1));
  settle(row.low0), settle(row.low1);  // keeps them together; otherwise g++ runs out of registers
  const __m256i high = half(16);
  row.high0 = _mm256_add_epi8(row.high0, _mm256_shuffle_epi8(high, i0));
  row.high1 = _mm256_add_epi8(row.high1, _mm256_shuffle_epi8(high, i1));
  settle(row.high0), settle(row.high1);
}

// Both bytes of sums to 16 bits.
void add_word(const Row& row, uint16_t* total) {
  const __m256i weights = _mm256_set1_epi16(1 | 32 << 8);
  const auto add = [&](int i, __m256i bytes) {
    store_bits(total + i, _mm256_add_epi16(load_bits(total + i), _mm256_maddubs_epi16(bytes, weights)));
  };
  add(0, _mm256_unpacklo_epi8(row.low0, row.high0));
  add(16, _mm256_unpackhi_epi8(row.low0, row.high0));
  add(32, _mm256_unpacklo_epi8(row.low1, row.high1));
  add(48, _mm256_unpackhi_epi8(row.low1, row.high1));
}

// The totals of `rows` rows over `words` words.
template <int rows>
[[gnu::noinline]] void look_up_span(const uint8_t* nibbles, const uint8_t* t0, const uint8_t* t1, int64_t words,
                                    uint16_t* total) {
  std::memset(total, 0, rows * kColumns * sizeof(uint16_t));
  for (int64_t w = 0; w < words; ++w, nibbles += 8 * kColumns, t0 += kWordTables, t1 += kWordTables) {
    const __m256i zero = _mm256_setzero_si256();
    Row r0{zero, zero, zero, zero}, r1 = r0;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m256i i0 = load_bits(nibbles + i * kColumns), i1 = load_bits(nibbles + i * kColumns + 32);
      look_up(r0, t0 + i * kTableBytes, i0, i1);
      if constexpr (rows == 2) look_up(r1, t1 + i * kTableBytes, i0, i1);
    }
    add_word(r0, total);
    if constexpr (rows == 2) add_word(r1, total + kColumns);
  }
}

// What a span is of its group, and the scales of the group.
struct Part {
  int64_t first, last;
  bool begins, ends, first_group;
  const float* scale;  // [kColumns]
};

// Adds the totals of a span to what is kept of a row.
void fold(const Part& part, const uint16_t* total, int32_t magnitude, float row_scale, Kept& kept) {
  const __m256i zero = _mm256_setzero_si256(), less = _mm256_set1_epi32(magnitude);
  const auto add = [&](int i, __m256i sums) {
    __m256i dot = _mm256_sub_epi32(_mm256_add_epi32(sums, sums), less);
    if (!part.begins) dot = _mm256_add_epi32(dot, load_bits(kept.dot + i));
    if (!part.ends) return store_bits(kept.dot + i, dot);
    const __m256 factor = _mm256_mul_ps(_mm256_loadu_ps(part.scale + i), _mm256_set1_ps(row_scale));
    __m256 value = _mm256_mul_ps(factor, _mm256_cvtepi32_ps(dot));
    if (!part.first_group) value = _mm256_add_ps(_mm256_load_ps(kept.sum + i), value);
    _mm256_store_ps(kept.sum + i, value);
  };
  for (int i = 0; i < kColumns; i += 16) {
    const __m256i sums = load_bits(total + i);
    add(i, _mm256_unpacklo_epi16(sums, zero));
    add(i + 8, _mm256_unpackhi_epi16(sums, zero));
  }
}

void add_span(const Task& task, const Part& part, int64_t row, int64_t count) {
  const uint8_t* table = task.table + part.first * kWordTables;
  const int64_t next = task.words * kWordTables, words = part.last - part.first;
  const auto fold_row = [&](int64_t i, const uint16_t* total) {
    const int32_t* magnitude = task.magnitude + i * (task.words + 1);
    fold(part, total, magnitude[part.last] - magnitude[part.first], task.p.row_scale[row + i], task.kept[i]);
  };
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    look_up_span<2>(task.nibbles, table + i * next, table + (i + 1) * next, words, task.total);
    fold_row(i, task.total);
    fold_row(i + 1, task.total + kColumns);
  }
  if (i == count) return;
  look_up_span<1>(task.nibbles, table + i * next, nullptr, words, task.total);
  fold_row(i, task.total);
}

// The results of a block of outputs.
void finish(const Task& task, int64_t row, int64_t count, int64_t tile) {
  const BinaryInt8MatmulParams& p = task.p;
  const int64_t column = tile * kTileRows, columns = std::min(kColumns, std::min(p.n, task.end * kTileRows) - column);
  float bias[kColumns];
  std::fill_n(bias, kColumns, -0.0f);  // x + -0 is x, for every x
  if (p.bias) std::memcpy(bias, p.bias + column, static_cast<size_t>(columns) * sizeof(float));
  with_dtype(p.out_dtype, p.out, [&]<class T>(T* out) {
    for (int64_t i = 0; i < count; ++i) {
      T* result = out + (row + i) * p.n + column;
      T part[kColumns];
      T* to = columns == kColumns ? result : part;
      for (int64_t j = 0; j < kColumns; j += 8) {
        __m256 value = _mm256_load_ps(task.kept[i].sum + j);
        if (p.addend && j < columns) {
          const float* addend = p.addend.at(row + i, tile + j / kTileRows) + j % kTileRows;
          value = _mm256_add_ps(value, _mm256_loadu_ps(addend));
        }
        store8(to + j, _mm256_add_ps(value, _mm256_loadu_ps(bias + j)));
      }
      if (to == part) std::memcpy(result, part, static_cast<size_t>(columns) * sizeof(T));
    }
  });
}

// The scales of a group for a block of outputs. What lies past the outputs does not matter.
void copy_scales(const Task& task, int64_t tile, int64_t group, float* scale) {
  const int64_t column = tile * kTileRows, columns = std::min(kColumns, task.p.n - column);
  for (int64_t i = 0; i < columns; ++i) scale[i] = task.p.scale[(column + i) * task.groups + group];
}

}  // namespace

void binary_int8_matmul_tiles_avx2(const BinaryInt8MatmulParams& p, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k), group_words = p.group_size > 0 ? p.group_size / 32 : words;
  const int64_t groups = ceil_div(words, group_words);
  const int64_t fit = std::clamp(kBlockTables / (words * kWordTables) / 2 * 2, kLeastRows, kMostRows);
  const int64_t rows = std::min(fit, p.m);
  const Task task{p,
                  words,
                  groups,
                  group_words,
                  end,
                  Scratch<uint8_t>(rows * words * kWordTables),
                  Scratch<int32_t>(rows * (words + 1)),
                  Scratch<uint8_t>(kSpanWords * 8 * kColumns),
                  Scratch<uint16_t>(2 * kColumns),
                  Scratch<Kept>(rows)};
  float scale[kColumns] = {};
  for (int64_t row = 0; row < p.m; row += rows) {
    const int64_t count = std::min(rows, p.m - row);
    make_tables(task, row, count);
    for (int64_t tile = begin; tile < end; tile += kTiles) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * group_words, last = std::min(words, first + group_words);
        copy_scales(task, tile, group, scale);
        for (int64_t w = first; w < last; w += kSpanWords) {
          const int64_t stop = std::min(w + kSpanWords, last);
          split_tiles(task, tile, w, stop);
          add_span(task, {w, stop, w == first, stop == last, group == 0, scale}, row, count);
        }
      }
      finish(task, row, count, tile);
    }
  }
}

}  // namespace bitmill::detail
