// SPDX-License-Identifier: Apache-2.0
// Binary products with VPOPCNTDQ: 4 rows x up to 5 tiles (4 are 64 outputs a row) stay in registers over all of k. A
// lane is an output, so 16 finished results leave a register at once. Bit-equal to the generic form, epilogue included.
// Weights with zeros are rare and take the generic form.
#include "avx512.h"
#include "binary_matmul.h"
#include "bit_output.h"
#include "bit_output_avx512.h"
#include "cpu.h"
#include "layout.h"
#include "read_ahead.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int kTiles = 5;                  // tiles side by side, at most: 4, or all of the last 5
constexpr int kRows = 4;                   // rows together; the rest comes one by one
constexpr int64_t kRowChunk = 128;         // rows whose bits and output pages stay near while the tiles pass by
constexpr int64_t kNearBytes = 512 << 10;  // an output of this size may be in the second-level cache already
constexpr int64_t kAhead = 8192;           // words of weights: 32 KiB
constexpr int64_t kLongWords = 64;         // from so many on, one row reads weights tile by tile
constexpr int64_t kShortWords = 8;         // below, asking for its lines costs more than it saves

struct Row {  // named, not an array: g++ keeps an indexed array of accumulators in memory
  __m512i c0, c1, c2, c3, c4;
};

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

// What every block of one call shares.
struct Task {
  const BinaryMatmulParams& p;
  int64_t words, groups, group_words;
  const int32_t* present;  // [m, groups]: k, pc(nonzero) or pc(a) over the columns of the group
  bool plain;              // one group, to integers or float32
  bool far;                // the lines of the output are asked for ahead
};

// Tiles side by side: at most kTiles, of which only the last can be cut by n. Scale and bias of the only group.
struct Columns {
  const int32_t* weight[kTiles];
  int64_t first;    // output column
  __mmask16 lanes;  // of the last tile
  __m512 scale[kTiles];
  __m512 bias[kTiles];
  Range positive[kTiles], negative[kTiles];  // for bits
};

template <Operand operand>
__m512i to_dot(__m512i counts, __m512i present) {
  const __m512i twice = _mm512_add_epi32(counts, counts);
  return operand == Operand::bool_ ? _mm512_sub_epi32(twice, present) : _mm512_sub_epi32(present, twice);
}

Columns load_columns(const Task& task, int64_t tile, int tiles) {
  Columns c;
  c.first = tile * kTileRows;
  c.lanes = first_lanes(task.p.n - (tile + tiles - 1) * kTileRows);
  for (int t = 0; t < kTiles; ++t) {
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

// Where the results of one row and one group go, copied out of Task: after a store of a vector g++ reads every member
// of it again.
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
[[gnu::always_inline]] inline void finish_bits(const BinaryMatmulParams& p, const Columns& c, int t, bool last,
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
[[gnu::always_inline]] inline void finish_bits(const Task& task, const Columns& c, int64_t row, const Row& counts) {
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
void add_group(const Task& task, const Columns& c, int tiles, int64_t row, int64_t group, const int32_t* counts,
               float* sums) {
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

Output row_of_output(const Task& task, const Columns& c, int64_t row) {
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

template <Operand operand, int rows, int tiles>
void block(const Task& task, const Columns& c, int64_t row) {
  const BinaryMatmulParams& p = task.p;
  const int32_t* a0 = p.a + row * task.words;
  const int32_t* z0 = operand == Operand::ternary ? p.a_nonzero + row * task.words : a0;
  const int64_t next = task.words, n = p.n;
  const int32_t k = static_cast<int32_t>(p.k), *present = task.present + row;
  const float* row_scale = p.row_scale ? p.row_scale + row : nullptr;
  const Output output = row_of_output(task, c, row);
  if (task.far) request<rows, tiles>(output, n);
  alignas(64) int32_t counts[rows][kTiles * kTileRows];
  alignas(64) float sums[rows][kTiles * kTileRows];
  for (int64_t group = 0; group < task.groups; ++group) {
    const __m512i zero = _mm512_setzero_si512();
    Row r0{zero, zero, zero, zero, zero}, r1 = r0, r2 = r0, r3 = r0;
    const int64_t begin = group * task.group_words;
    const int64_t end = begin + task.group_words < task.words ? begin + task.group_words : task.words;
    add_word<operand, rows, tiles, true>(r0, r1, r2, r3, c.weight, a0, z0, next, begin);
    for (int64_t w = begin + 1; w < end; ++w) {
      add_word<operand, rows, tiles, false>(r0, r1, r2, r3, c.weight, a0, z0, next, w);
    }
    if (task.plain) {
      Output o = output;
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
          // columns, counts and what is left are exact floats, so one fused operation makes the dot product
          return put_rows<tiles>(
              [&](int r, int t, __m512i counts) __attribute__((always_inline)) {
                const __m512 most = _mm512_set1_ps(static_cast<float>(all[r])), two = _mm512_set1_ps(2.0f);
                const __m512 dot = _mm512_fnmadd_ps(two, _mm512_cvtepi32_ps(counts), most);
                const __m512 value = _mm512_add_ps(_mm512_mul_ps(o.scale[t], dot), o.bias[t]);
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
    keep(r0, counts[0]);
    if constexpr (rows > 1) keep(r1, counts[1]), keep(r2, counts[2]), keep(r3, counts[3]);
    for (int r = 0; r < rows; ++r) add_group<operand>(task, c, tiles, row + r, group, counts[r], sums[r]);
  }
}

template <int rows, int tiles>
void block(const Task& task, const Columns& c, int64_t row) {
  const BinaryMatmulParams& p = task.p;
  if (p.operand == Operand::bool_) return block<Operand::bool_, rows, tiles>(task, c, row);
  if (p.operand == Operand::ternary) {  // rows without a zero are plain signs
    int64_t present = 0;
    for (int64_t i = row * task.groups; i < (row + rows) * task.groups; ++i) present += task.present[i];
    if (present != rows * p.k) return block<Operand::ternary, rows, tiles>(task, c, row);
  }
  block<Operand::sign, rows, tiles>(task, c, row);
}

// Rows [begin, end) times `tiles` tiles.
template <int tiles>
void columns(const Task& task, int64_t tile, int64_t begin, int64_t end) {
  const Columns c = load_columns(task, tile, tiles);
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) block<kRows, tiles>(task, c, row);
  for (; row < end; ++row) block<1, tiles>(task, c, row);
}

// Whether binary_matmul_short_avx512vnni may do it, and there are rows for what it prepares.
bool is_short(const BinaryMatmulParams& p, int64_t begin, int64_t end) {
  const bool whole = begin == 0 && end == tile_count(p.n) && p.n > kTileRows && p.n % kTileRows != 0;
  return has_int8_dot() && p.dot && p.operand == Operand::sign && word_count(p.k) <= 2 && whole && p.m >= kTileRows;
}

// present[m, groups]: columns of the group where the activation is not 0.
void count_present(const BinaryMatmulParams& p, int64_t groups, int64_t group_words, int32_t* present) {
  const int64_t words = word_count(p.k);
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t from = group * group_words, to = from + group_words < words ? from + group_words : words;
      int64_t count = (32 * to < p.k ? 32 * to : p.k) - 32 * from;
      if (p.operand != Operand::sign) {
        const int32_t* bits = (p.operand == Operand::ternary ? p.a_nonzero : p.a) + row * words;
        count = 0;
        for (int64_t w = from; w < to; ++w) count += _mm_popcnt_u32(static_cast<uint32_t>(bits[w]));
      }
      present[row * groups + group] = static_cast<int32_t>(count);
    }
  }
}

}  // namespace

void binary_matmul_tiles_avx512(const BinaryMatmulParams& p, int64_t begin, int64_t end) {
  if (p.weight_nonzero || p.k == 0) return binary_matmul_tiles_generic(p, begin, end);
  const int64_t words = word_count(p.k);
  if (is_short(p, begin, end)) return binary_matmul_short_avx512vnni(p);
  const int64_t group_words = p.group_size > 0 && !p.dot && !p.bits.sign ? p.group_size / 32 : words;
  const int64_t groups = ceil_div(words, group_words);
  const bool plain = groups == 1 && !p.bits.sign && (p.dot || p.out_dtype == Dtype::f32);
  const bool counts = !plain || p.operand != Operand::sign;
  const Scratch<int32_t> present(counts ? p.m * groups : 0);
  if (counts) count_present(p, groups, group_words, present);
  const bool far = plain && asks_for_writes() && (words >= kShortWords || p.m * p.n * 4 > kNearBytes);
  const Task task{p, words, groups, group_words, counts ? present.get() : nullptr, plain, far};
  for (int64_t row = 0; row < p.m; row += kRowChunk) {
    const int64_t last = row + kRowChunk < p.m ? row + kRowChunk : p.m;
    int64_t tile = begin, left = end - begin;
    for (; p.m == 1 && words >= kLongWords && left > 0; ++tile, --left) columns<1>(task, tile, row, last);
    for (; left > kTiles || left == 4; tile += 4, left -= 4) columns<4>(task, tile, row, last);
    if (left == 5) columns<5>(task, tile, row, last);
    if (left == 3) columns<3>(task, tile, row, last);
    if (left == 2) columns<2>(task, tile, row, last);
    if (left == 1) columns<1>(task, tile, row, last);
  }
}

}  // namespace bitmill::detail
