// SPDX-License-Identifier: Apache-2.0
// Binary products with AVX-512, all but the counting: 4 rows x up to 5 tiles (4 are 64 outputs a row) whose counts are
// in registers become integers, floats or bits there. A lane is an output.
#pragma once

#include "avx512.h"
#include "binary_matmul.h"
#include "bit_output.h"
#include "bit_output_avx512.h"
#include "layout.h"

namespace bitmill::detail {

inline constexpr int kMostTiles = 5;  // side by side
inline constexpr int kBlockRows = 4;  // rows together

// What every block of one call shares.
struct BinaryTask {
  const BinaryMatmulParams& p;
  int64_t words, groups, group_words;
  const int32_t* present;  // [m, groups]: k, pc(nonzero) or pc(a) over the columns of the group
  bool plain;              // one group, to integers or float32
  bool far;                // the lines of the output are asked for ahead
  bool zeros = false;      // Operand::ternary, and some activation of these rows is 0
  // Rows from `triples_from` on as binary_triples_avx512vnni.cpp counts them, or null.
  const int32_t* triples = nullptr;
  int64_t triples_from = 0;
};

// Tiles side by side: at most kMostTiles, of which only the last can be cut by n. Scale and bias of the only group.
struct BinaryColumns {
  const int32_t* weight[kMostTiles];
  int64_t first;    // output column
  __mmask16 lanes;  // of the last tile
  __m512 scale[kMostTiles];
  __m512 bias[kMostTiles];
  Range positive[kMostTiles], negative[kMostTiles];  // for bits
  const int32_t* triples = nullptr;                  // the weights, with the rows' triples
};

// Counting three words together pays from so many rows, words and tiles on, with at most 4 tiles side by side.
inline constexpr int64_t kRowsOfTriples = 64, kWordsOfTriples = 8, kTilesOfTriples = 12;
void prepare_rows_of_triples_avx512vnni(const int32_t* a, int64_t rows, int64_t words, int32_t* triples);
void prepare_columns_of_triples_avx512vnni(const BinaryColumns& columns, int tiles, int64_t words, int32_t* triples);
void binary_triples_avx512vnni(const BinaryTask& task, const BinaryColumns& columns, int tiles, int64_t begin,
                               int64_t end);

// In an unnamed namespace, so that what files for an instruction set make of it stays theirs (.ci/check_symbols).
namespace {

struct Row {  // named, not an array: g++ keeps an indexed array of accumulators in memory
  __m512i c0, c1, c2, c3, c4;
};

template <Operand operand>
__m512i to_dot(__m512i counts, __m512i present) {
  const __m512i twice = _mm512_add_epi32(counts, counts);
  return operand == Operand::bool_ ? _mm512_sub_epi32(twice, present) : _mm512_sub_epi32(present, twice);
}

// Columns that count, counts and what is left are exact floats, so one fused operation makes the dot product.
[[gnu::always_inline]] inline __m512 scaled(__m512i counts, __m512 columns, __m512 scale, __m512 bias) {
  const __m512 dot = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), _mm512_cvtepi32_ps(counts), columns);
  return _mm512_add_ps(_mm512_mul_ps(scale, dot), bias);
}

// Where the results of one row and one group go, copied out of BinaryTask: after a store of a vector g++ reads every
// member of it again.
struct Output {
  int32_t* dot;  // or null
  float* out;
  const __m512 *scale, *bias;
  const float* residual;  // or null
  __mmask16 lanes;        // of the last tile
};

template <bool last>
[[gnu::always_inline]] inline void finish_tile(const Output& o, int t, __m512i dot, bool scaled, __m512 factor) {
  if (o.dot) {
    int32_t* const to = o.dot + t * kTileRows;
    if (last && o.lanes != 0xFFFF) return _mm512_mask_storeu_epi32(to, o.lanes, dot);
    return _mm512_storeu_si512(to, dot);
  }
  const __m512 scale = scaled ? _mm512_mul_ps(o.scale[t], factor) : o.scale[t];
  __m512 value = _mm512_add_ps(_mm512_mul_ps(scale, _mm512_cvtepi32_ps(dot)), o.bias[t]);
  const __mmask16 lanes = last ? o.lanes : __mmask16{0xFFFF};
  if (o.residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, o.residual + t * kTileRows));
  float* const to = o.out + t * kTileRows;
  if (last && o.lanes != 0xFFFF) return _mm512_mask_storeu_ps(to, o.lanes, value);
  _mm512_storeu_ps(to, value);
}

// Counts of one row to integers or float32.
template <Operand operand, int tiles>
[[gnu::always_inline]] inline void finish(const Output& o, int32_t columns, const float* row_scale, const Row& counts) {
  const __m512i present = _mm512_set1_epi32(columns);
  const __m512 factor = _mm512_set1_ps(row_scale ? *row_scale : 1.0f);
  finish_tile<tiles == 1>(o, 0, to_dot<operand>(counts.c0, present), row_scale, factor);
  if constexpr (tiles > 1) finish_tile<tiles == 2>(o, 1, to_dot<operand>(counts.c1, present), row_scale, factor);
  if constexpr (tiles > 2) finish_tile<tiles == 3>(o, 2, to_dot<operand>(counts.c2, present), row_scale, factor);
  if constexpr (tiles > 3) finish_tile<tiles == 4>(o, 3, to_dot<operand>(counts.c3, present), row_scale, factor);
  if constexpr (tiles > 4) finish_tile<tiles == 5>(o, 4, to_dot<operand>(counts.c4, present), row_scale, factor);
}

// The same for 4 rows where nothing has to be looked for: put(row, tile, 16 counts).
template <int tiles, class Put>
[[gnu::always_inline]] inline void put_rows(const Put& put, const Row& r0, const Row& r1, const Row& r2,
                                            const Row& r3) {
  const auto row = [&](int r, const Row& counts) __attribute__((always_inline)) {
    put(r, 0, counts.c0);
    if constexpr (tiles > 1) put(r, 1, counts.c1);
    if constexpr (tiles > 2) put(r, 2, counts.c2);
    if constexpr (tiles > 3) put(r, 3, counts.c3);
    if constexpr (tiles > 4) put(r, 4, counts.c4);
  };
  row(0, r0), row(1, r1), row(2, r2), row(3, r3);
}

// Kept out of line: rare, and its loops would take registers.
[[gnu::noinline]] uint32_t look_for_negatives(const BitOutput& out, int64_t tile, __m512i dot, uint32_t zeros) {
  alignas(64) int32_t dots[kTileRows];
  _mm512_store_si512(dots, dot);
  return single_negatives(out, tile, dots, zeros);
}

// Bytes of a plane for `tiles` tiles, and a half word of zeros after them if that is past n.
template <int tiles>
[[gnu::always_inline]] inline void put_bits(char* to, uint64_t bits, bool ends) {
  __builtin_memcpy(to, &bits, 2 * tiles);
  if (ends) __builtin_memset(to + 2 * tiles, 0, 2);
}

// Dot products of one row and at most 4 tiles, from tile `t` of the block, to bits.
template <int tiles>
[[gnu::always_inline]] inline void finish_bits(const BinaryMatmulParams& p, const BinaryColumns& c, int t, bool last,
                                               int64_t row, __m512i d0, __m512i d1, __m512i d2, __m512i d3) {
  const int64_t tile = c.first / kTileRows + t, at = 4 * row * word_count(p.n) + 2 * tile;
  const bool ends = last && (tile + tiles) % 2 == 1 && tile + tiles == tile_count(p.n);
  const __mmask16 all = 0xFFFF, none = 0, cut = last ? c.lanes : all;
  const __mmask16 l0 = tiles > 1 ? all : cut, l1 = tiles > 2 ? all : tiles == 2 ? cut : none;
  const __mmask16 l2 = tiles > 3 ? all : tiles == 3 ? cut : none, l3 = tiles == 4 ? cut : none;
  const auto inside_all = [&](const Range* range) [[gnu::always_inline]] {
    return join(inside(l0, range[t], d0), tiles > 1 ? inside(l1, range[t + 1], d1) : none,
                tiles > 2 ? inside(l2, range[t + 2], d2) : none, tiles > 3 ? inside(l3, range[t + 3], d3) : none);
  };
  const uint64_t positive = inside_all(c.positive);
  put_bits<tiles>(reinterpret_cast<char*>(p.bits.sign) + at, positive, ends);
  if (!p.bits.nonzero) return;
  uint64_t nonzero = positive | inside_all(c.negative);
  constexpr int before = 16 * (tiles - 1);
  const uint64_t lanes = uint64_t{cut} << before | ((uint64_t{1} << before) - 1);
  const uint64_t zeros = lanes & ~nonzero;
  if (zeros && p.bits.single) {
    const __m512i dots[] = {d0, d1, d2, d3};
    for (int i = 0; i < tiles; ++i) {
      const uint64_t found = look_for_negatives(p.bits, tile + i, dots[i], zeros >> (16 * i) & 0xFFFF);
      nonzero |= found << (16 * i);
    }
  }
  put_bits<tiles>(reinterpret_cast<char*>(p.bits.nonzero) + at, nonzero, ends);
}

// Counts of one row to bits.
template <Operand operand, int tiles>
[[gnu::always_inline]] inline void finish_bits(const BinaryTask& task, const BinaryColumns& c, int64_t row,
                                               const Row& counts) {
  const __m512i present = _mm512_set1_epi32(task.present[row]);
  constexpr int first = tiles < 4 ? tiles : 4;
  finish_bits<first>(task.p, c, 0, tiles < 5, row, to_dot<operand>(counts.c0, present),
                     to_dot<operand>(counts.c1, present), to_dot<operand>(counts.c2, present),
                     to_dot<operand>(counts.c3, present));
  if constexpr (tiles > 4) {
    const __m512i dot = to_dot<operand>(counts.c4, present);
    finish_bits<1>(task.p, c, 4, true, row, dot, dot, dot, dot);
  }
}

// Counts [tiles][16] of one row and one of any number of groups, to any dtype. `sums` carries floats between groups.
template <Operand operand>
void add_group(const BinaryTask& task, const BinaryColumns& c, int tiles, int64_t row, int64_t group,
               const int32_t* counts, float* sums) {
  const BinaryMatmulParams& p = task.p;
  const __m512i present = _mm512_set1_epi32(task.present[row * task.groups + group]);
  const __m512 factor = _mm512_set1_ps(p.row_scale ? p.row_scale[row] : 1.0f);
  for (int t = 0; t < tiles; ++t) {
    const int64_t column = c.first + t * kTileRows;
    const __mmask16 lanes = t + 1 < tiles ? __mmask16{0xFFFF} : c.lanes;
    const __m512i dot = to_dot<operand>(_mm512_load_si512(counts + t * kTileRows), present);
    const __m512 scale = _mm512_mul_ps(load_scale(p.scale, task.groups, column, group, lanes), factor);
    __m512 value = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(dot));
    if (group > 0) value = _mm512_add_ps(_mm512_load_ps(sums + t * kTileRows), value);
    if (group + 1 < task.groups) {
      _mm512_store_ps(sums + t * kTileRows, value);
      continue;
    }
    value = _mm512_add_ps(value, c.bias[t]);
    if (p.residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, p.residual + row * p.n + column));
    with_dtype(p.out_dtype, p.out, [&](auto* out) { store16(out + row * p.n + column, lanes, value); });
  }
}

void keep(const Row& counts, int32_t* memory) {
  _mm512_store_si512(memory, counts.c0);
  _mm512_store_si512(memory + kTileRows, counts.c1);
  _mm512_store_si512(memory + 2 * kTileRows, counts.c2);
  _mm512_store_si512(memory + 3 * kTileRows, counts.c3);
  _mm512_store_si512(memory + 4 * kTileRows, counts.c4);
}

Output row_of_output(const BinaryTask& task, const BinaryColumns& c, int64_t row) {
  const int64_t at = row * task.p.n + c.first;
  int32_t* const dot = task.p.dot ? task.p.dot + at : nullptr;
  float* const out = task.plain && !dot ? static_cast<float*>(task.p.out) + at : nullptr;
  return {dot, out, c.scale, c.bias, task.p.residual ? task.p.residual + at : nullptr, c.lanes};
}

Output next_row(Output o, int64_t n) {
  if (o.dot) o.dot += n;
  if (o.out) o.out += n;
  if (o.residual) o.residual += n;
  return o;
}

// Asks for the lines that a block is going to write, which takes as long as computing them when they are far away.
template <int rows, int tiles>
[[gnu::always_inline]] inline void request(Output o, int64_t n) {
  const char* const to = o.dot ? reinterpret_cast<const char*>(o.dot) : reinterpret_cast<const char*>(o.out);
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 5
    for (int t = 0; t < tiles; ++t) __builtin_prefetch(to + 4 * (r * n + t * kTileRows), 1);
  }
}

// What a block ends with: the counts of one group, a Row for each of its rows. `sums` carries floats between groups.
template <Operand operand, int rows, int tiles>
[[gnu::always_inline]] inline void finish_block(const BinaryTask& task, const BinaryColumns& c, int64_t row,
                                                int64_t group, const Row& r0, const Row& r1, const Row& r2,
                                                const Row& r3, float (*sums)[kMostTiles * kTileRows]) {
  const BinaryMatmulParams& p = task.p;
  const int64_t n = p.n;
  const int32_t k = static_cast<int32_t>(p.k), *present = task.present + row;
  const float* row_scale = p.row_scale ? p.row_scale + row : nullptr;
  if (task.plain) {
    Output o = row_of_output(task, c, row);
    int32_t all[rows];  // columns that count; before a store, which could change them for all g++ knows
    for (int r = 0; r < rows; ++r) all[r] = operand == Operand::sign ? k : present[r];
    if constexpr (rows > 1 && operand != Operand::bool_) {
      if (o.dot && o.lanes == 0xFFFF) {
        return put_rows<tiles>(
            [&](int r, int t, __m512i counts) __attribute__((always_inline)) {
              const __m512i dot = to_dot<operand>(counts, _mm512_set1_epi32(all[r]));
              _mm512_storeu_si512(o.dot + r * n + t * kTileRows, dot);
            },
            r0, r1, r2, r3);
      }
      if (o.out && !row_scale && !o.residual && o.lanes == 0xFFFF) {
        return put_rows<tiles>(
            [&](int r, int t, __m512i counts) __attribute__((always_inline)) {
              const __m512 columns = _mm512_set1_ps(static_cast<float>(all[r]));
              const __m512 value = scaled(counts, columns, o.scale[t], o.bias[t]);
              _mm512_storeu_ps(o.out + r * n + t * kTileRows, value);
            },
            r0, r1, r2, r3);
      }
    }
    const auto scale_of = [&](int r) { return row_scale ? row_scale + r : nullptr; };
    finish<operand, tiles>(o, all[0], scale_of(0), r0);
    if constexpr (rows > 1) {
      finish<operand, tiles>(o = next_row(o, n), all[1], scale_of(1), r1);
      finish<operand, tiles>(o = next_row(o, n), all[2], scale_of(2), r2);
      finish<operand, tiles>(o = next_row(o, n), all[3], scale_of(3), r3);
    }
    return;
  }
  if (p.bits.sign) {
    finish_bits<operand, tiles>(task, c, row, r0);
    if constexpr (rows > 1) {
      finish_bits<operand, tiles>(task, c, row + 1, r1);
      finish_bits<operand, tiles>(task, c, row + 2, r2);
      finish_bits<operand, tiles>(task, c, row + 3, r3);
    }
    return;
  }
  alignas(64) int32_t counts[rows][kMostTiles * kTileRows];
  keep(r0, counts[0]);
  if constexpr (rows > 1) keep(r1, counts[1]), keep(r2, counts[2]), keep(r3, counts[3]);
  for (int r = 0; r < rows; ++r) add_group<operand>(task, c, tiles, row + r, group, counts[r], sums[r]);
}

}  // namespace

}  // namespace bitmill::detail
