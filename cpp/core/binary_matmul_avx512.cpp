// SPDX-License-Identifier: Apache-2.0
// Binary products with VPOPCNTDQ: 4 rows x up to 5 tiles (4 are 64 outputs a row) stay in registers over all of k. A
// lane is an output, so 16 finished results leave a register at once. Bit-equal to the generic form, epilogue included.
// No weight is 0 here (zero_weights.h). Many rows of signs are counted by triples of words
// (binary_triples_avx512vnni.cpp), products of one or two words by binary_matmul_short_avx512vnni.cpp.
#include "avx512.h"
#include "binary_blocks_avx512.h"
#include "binary_matmul.h"
#include "cpu.h"
#include "layout.h"
#include "read_ahead.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kRowChunk = 128;         // rows whose bits and output pages stay near while the tiles pass by
constexpr int64_t kNearBytes = 512 << 10;  // an output of this size may be in the second-level cache already
constexpr int64_t kAhead = 8192;           // words of weights: 32 KiB
constexpr int64_t kLongWords = 64;         // from so many on, one row reads weights tile by tile
constexpr int64_t kShortWords = 8;         // below, asking for its lines costs more than it saves

template <Operand operand, bool first>
__m512i count(__m512i sum, __m512i a, __m512i nonzero, __m512i weight) {
  __m512i bits;
  if constexpr (operand == Operand::sign) {
    bits = _mm512_xor_si512(a, weight);
  } else if constexpr (operand == Operand::ternary) {
    bits = _mm512_ternarylogic_epi64(a, weight, nonzero, 0x28);  // (a ^ weight) & nonzero
  } else {
    bits = _mm512_and_si512(a, weight);
  }
  sum = first ? _mm512_popcnt_epi32(bits) : _mm512_add_epi32(sum, _mm512_popcnt_epi32(bits));
  // keeps xor, popcount and add of one output together; otherwise g++ runs out of registers
  asm volatile("" : "+v"(sum));
  return sum;
}

template <Operand operand, int tiles, bool first>
void step(Row& row, int32_t a, int32_t nonzero, __m512i w0, __m512i w1, __m512i w2, __m512i w3, __m512i w4) {
  const __m512i bits = _mm512_set1_epi32(a);
  const __m512i present = operand == Operand::ternary ? _mm512_set1_epi32(nonzero) : bits;
  row.c0 = count<operand, first>(row.c0, bits, present, w0);
  if constexpr (tiles > 1) row.c1 = count<operand, first>(row.c1, bits, present, w1);
  if constexpr (tiles > 2) row.c2 = count<operand, first>(row.c2, bits, present, w2);
  if constexpr (tiles > 3) row.c3 = count<operand, first>(row.c3, bits, present, w3);
  if constexpr (tiles > 4) row.c4 = count<operand, first>(row.c4, bits, present, w4);
}

// One word of every row and tile. `next` words lie between rows.
template <Operand operand, int rows, int tiles, bool first>
[[gnu::always_inline]] inline void add_word(Row& r0, Row& r1, Row& r2, Row& r3, const int32_t* const* weight,
                                            const int32_t* a, const int32_t* z, int64_t next, int64_t w) {
  if constexpr (rows == 1 && tiles == 1) {  // waits for the weights, unless they are asked for
    read_ahead(weight[0] + w * kTileRows);
    if (begins_page(w)) read_page_ahead(weight[0] + w * kTileRows);
  } else if constexpr (rows == 1) {
#pragma GCC unroll 5
    for (int t = 0; t < tiles; ++t) __builtin_prefetch(weight[t] + w * kTileRows + kAhead, 0, 2);
  }
  const __m512i v0 = _mm512_loadu_si512(weight[0] + w * kTileRows);
  const __m512i v1 = tiles > 1 ? _mm512_loadu_si512(weight[1] + w * kTileRows) : v0;
  const __m512i v2 = tiles > 2 ? _mm512_loadu_si512(weight[2] + w * kTileRows) : v0;
  const __m512i v3 = tiles > 3 ? _mm512_loadu_si512(weight[3] + w * kTileRows) : v0;
  const __m512i v4 = tiles > 4 ? _mm512_loadu_si512(weight[4] + w * kTileRows) : v0;
  step<operand, tiles, first>(r0, a[w], z[w], v0, v1, v2, v3, v4);
  if constexpr (rows > 1) {
    step<operand, tiles, first>(r1, a[w + next], z[w + next], v0, v1, v2, v3, v4);
    step<operand, tiles, first>(r2, a[w + 2 * next], z[w + 2 * next], v0, v1, v2, v3, v4);
    step<operand, tiles, first>(r3, a[w + 3 * next], z[w + 3 * next], v0, v1, v2, v3, v4);
  }
}

BinaryColumns load_columns(const BinaryTask& task, int64_t tile, int tiles) {
  BinaryColumns c;
  c.first = tile * kTileRows;
  c.lanes = first_lanes(task.p.n - (tile + tiles - 1) * kTileRows);
  for (int t = 0; t < kMostTiles; ++t) {
    const int64_t inside = t < tiles ? t : tiles - 1, column = c.first + inside * kTileRows;
    const __mmask16 lanes = inside == tiles - 1 ? c.lanes : __mmask16{0xFFFF};
    c.weight[t] = task.p.weight + (tile + inside) * task.words * kTileRows;
    if (task.p.dot) continue;
    if (task.p.bits.sign) {
      c.positive[t] = load_range(task.p.bits.positive + column, task.p.n, lanes);
      if (task.p.bits.negative) c.negative[t] = load_range(task.p.bits.negative + column, task.p.n, lanes);
      continue;
    }
    c.scale[t] = load_scale(task.p.scale, task.groups, column, 0, lanes);
    // x + -0 is x, for every x
    c.bias[t] = task.p.bias ? _mm512_maskz_loadu_ps(lanes, task.p.bias + column) : _mm512_set1_ps(-0.0f);
  }
  return c;
}

// How many lines of the next tiles a block asks for with every word. The first blocks of rows share them out: at once,
// they would wait for memory, and the others only compute.
template <int tiles>
int64_t lines_ahead(const BinaryTask& task, int64_t row) {
  const int64_t blocks = task.p.m / kBlockRows, lines = blocks >= tiles ? 1 : ceil_div(tiles, blocks);
  return row / kBlockRows * lines < tiles ? lines : 0;
}

template <Operand operand, int rows, int tiles>
void block(const BinaryTask& task, const BinaryColumns& c, int64_t row) {
  const int64_t lines = rows == kBlockRows ? lines_ahead<tiles>(task, row) : 0;
  const int32_t* ahead = c.weight[0] + (tiles + row / kBlockRows * lines) * task.words * kTileRows;
  const int32_t* a0 = task.p.a + row * task.words;
  const int32_t* z0 = operand == Operand::ternary ? task.p.a_nonzero + row * task.words : a0;
  const int64_t next = task.words;
  if (task.far) request<rows, tiles>(row_of_output(task, c, row), task.p.n);
  alignas(64) float sums[rows][kMostTiles * kTileRows];
  for (int64_t group = 0; group < task.groups; ++group) {
    const __m512i zero = _mm512_setzero_si512();
    Row r0{zero, zero, zero, zero, zero}, r1 = r0, r2 = r0, r3 = r0;
    const int64_t begin = group * task.group_words;
    const int64_t end = begin + task.group_words < task.words ? begin + task.group_words : task.words;
    add_word<operand, rows, tiles, true>(r0, r1, r2, r3, c.weight, a0, z0, next, begin);
    for (int64_t w = begin + 1; w < end; ++w) {
      for (int64_t i = 0; i < lines; ++i, ahead += kTileRows) __builtin_prefetch(ahead, 0, 2);
      add_word<operand, rows, tiles, false>(r0, r1, r2, r3, c.weight, a0, z0, next, w);
    }
    finish_block<operand, rows, tiles>(task, c, row, group, r0, r1, r2, r3, sums);
  }
}

// Whether some activation of `rows` rows is 0; others of Operand::ternary are plain signs.
bool has_zeros(const BinaryTask& task, int64_t row, int64_t rows) {
  int64_t present = 0;
  for (int64_t i = row * task.groups; i < (row + rows) * task.groups; ++i) present += task.present[i];
  return present != rows * task.p.k;
}

// Where whole blocks of rows without a zero end that begin with `row`.
int64_t end_of_signs(const BinaryTask& task, int64_t row, int64_t end) {
  if (!task.zeros) return end - (end - row) % kBlockRows;
  while (row + kBlockRows <= end && !has_zeros(task, row, kBlockRows)) row += kBlockRows;
  return row;
}

// Whether enough rows of [begin, end) can be counted by triples.
bool repay_triples(const BinaryTask& task, int64_t begin, int64_t end) {
  int64_t rows = 0;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int64_t signs = end_of_signs(task, row, end);
    rows += signs - row;
    row = signs;
  }
  return rows >= kRowsOfTriples;
}

template <int rows, int tiles>
void block(const BinaryTask& task, const BinaryColumns& c, int64_t row) {
  if (task.p.operand == Operand::bool_) return block<Operand::bool_, rows, tiles>(task, c, row);
  if (task.zeros && has_zeros(task, row, rows)) return block<Operand::ternary, rows, tiles>(task, c, row);
  block<Operand::sign, rows, tiles>(task, c, row);
}

// Rows [begin, end) times `tiles` tiles. `triples` has room for their weights, where rows are counted by triples.
template <int tiles>
void columns(const BinaryTask& task, int64_t tile, int64_t begin, int64_t end, int32_t* triples) {
  BinaryColumns c = load_columns(task, tile, tiles);
  if (task.triples) {
    prepare_columns_of_triples_avx512vnni(c, tiles, task.words, triples);
    c.triples = triples;
  }
  int64_t row = begin;
  while (row + kBlockRows <= end) {
    const int64_t signs = c.triples ? end_of_signs(task, row, end) : row;
    if (signs > row) {
      binary_triples_avx512vnni(task, c, tiles, row, signs);
      row = signs;
    } else {
      block<kBlockRows, tiles>(task, c, row);
      row += kBlockRows;
    }
  }
  for (; row < end; ++row) block<1, tiles>(task, c, row);
}

// Whether binary_matmul_short_avx512vnni may do it.
bool is_short(const BinaryMatmulParams& p, int64_t begin, int64_t end) {
  if (!has_int8_dot() || p.operand != Operand::sign || word_count(p.k) > 2 || p.m < kTileRows) return false;
  if (begin != 0 || end != tile_count(p.n) || p.bits.sign) return false;
  return p.dot ||
         (p.out_dtype == Dtype::f32 && !p.row_scale && !p.residual && (p.group_size == 0 || p.group_size >= p.k));
}

int32_t count_bits(const int32_t* bits, int64_t words) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t w = 0; w < words; w += kTileRows) {
    sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_maskz_loadu_epi32(first_lanes(words - w), bits + w)));
  }
  return _mm512_reduce_add_epi32(sum);
}

// present[m, groups]: columns of the group where the activation is not 0.
void count_present(const BinaryMatmulParams& p, int64_t groups, int64_t group_words, int32_t* present) {
  const int64_t words = word_count(p.k);
  const int32_t* const bits = p.operand == Operand::ternary ? p.a_nonzero : p.a;
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t from = group * group_words, to = from + group_words < words ? from + group_words : words;
      const int64_t columns = (32 * to < p.k ? 32 * to : p.k) - 32 * from;
      present[row * groups + group] =
          p.operand == Operand::sign ? static_cast<int32_t>(columns) : count_bits(bits + row * words + from, to - from);
    }
  }
}

}  // namespace

void binary_matmul_tiles_avx512(const BinaryMatmulParams& p, int64_t begin, int64_t end) {
  if (p.k == 0) return binary_matmul_tiles_generic(p, begin, end);
  const int64_t words = word_count(p.k);
  if (is_short(p, begin, end)) return binary_matmul_short_avx512vnni(p);
  const int64_t group_words = p.group_size > 0 && !p.dot && !p.bits.sign ? p.group_size / 32 : words;
  const int64_t groups = ceil_div(words, group_words);
  const bool plain = groups == 1 && !p.bits.sign && (p.dot || p.out_dtype == Dtype::f32);
  const bool counts = !plain || p.operand != Operand::sign;
  const bool may_triple = has_int8_dot() && groups == 1 && p.operand != Operand::bool_ && p.m >= kRowsOfTriples &&
                          words >= kWordsOfTriples && end - begin >= kTilesOfTriples;
  const int64_t of_weights = may_triple ? 4 * kTileRows * words : 0, of_rows = may_triple ? kRowChunk * words : 0;
  const Scratch<int32_t> room(of_weights + of_rows + (counts ? p.m * groups : 0));
  int32_t *const weights = room, *const rows = weights + of_weights, *const present = rows + of_rows;
  if (counts) count_present(p, groups, group_words, present);
  const bool far = plain && asks_for_writes() && (words >= kShortWords || p.m * p.n * 4 > kNearBytes);
  BinaryTask task{p, words, groups, group_words, counts ? present : nullptr, plain, far};
  for (int64_t row = 0; row < p.m; row += kRowChunk) {
    const int64_t last = row + kRowChunk < p.m ? row + kRowChunk : p.m;
    task.zeros = p.operand == Operand::ternary && has_zeros(task, row, last - row);
    task.triples = nullptr;
    if (may_triple && repay_triples(task, row, last)) {
      prepare_rows_of_triples_avx512vnni(p.a + row * words, last - row, words, rows);
      task.triples = rows;
      task.triples_from = row;
    }
    const int64_t most = task.triples ? 4 : kMostTiles;
    int64_t tile = begin, left = end - begin;
    for (; p.m == 1 && words >= kLongWords && left > 0; ++tile, --left) columns<1>(task, tile, row, last, weights);
    for (; left > most || left == 4; tile += 4, left -= 4) columns<4>(task, tile, row, last, weights);
    if (left == 5) columns<5>(task, tile, row, last, weights);
    if (left == 3) columns<3>(task, tile, row, last, weights);
    if (left == 2) columns<2>(task, tile, row, last, weights);
    if (left == 1) columns<1>(task, tile, row, last, weights);
  }
}

}  // namespace bitmill::detail
