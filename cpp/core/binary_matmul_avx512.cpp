// SPDX-License-Identifier: Apache-2.0
// Binary products with VPOPCNTDQ: 4 rows x 4 tiles (64 outputs a row) stay in registers over all of k. A lane
// is an output, so 16 finished results leave a register at once. Bit-equal to the generic form, epilogue
// included. Weights with zeros are rare and take the generic form.
#include "avx512.h"
#include "binary_matmul.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

constexpr int kTiles = 4;  // tiles side by side

struct Row {  // named, not an array: g++ keeps an indexed array of accumulators in memory
  __m512i c0, c1, c2, c3;
};

template <Operand operand>
__m512i count(__m512i sum, __m512i a, __m512i nonzero, __m512i weight) {
  __m512i bits;
  if constexpr (operand == Operand::sign) {
    bits = _mm512_xor_si512(a, weight);
  } else if constexpr (operand == Operand::ternary) {
    bits = _mm512_ternarylogic_epi64(a, weight, nonzero, 0x28);  // (a ^ weight) & nonzero
  } else {
    bits = _mm512_and_si512(a, weight);
  }
  sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(bits));
  asm volatile(""
               : "+v"(sum));  // keeps xor, popcount and add of one output together; otherwise g++ runs out of registers
  return sum;
}

template <Operand operand>
void step(Row& row, int32_t a, int32_t nonzero, __m512i w0, __m512i w1, __m512i w2, __m512i w3) {
  const __m512i bits = _mm512_set1_epi32(a);
  const __m512i present = operand == Operand::ternary ? _mm512_set1_epi32(nonzero) : bits;
  row.c0 = count<operand>(row.c0, bits, present, w0);
  row.c1 = count<operand>(row.c1, bits, present, w1);
  row.c2 = count<operand>(row.c2, bits, present, w2);
  row.c3 = count<operand>(row.c3, bits, present, w3);
}

// What every block of one call shares.
struct Task {
  const BinaryMatmulParams& p;
  int64_t words, groups, group_words;
  int64_t end;             // the first tile that belongs to somebody else
  const int32_t* present;  // [m, groups]: k, pc(nonzero) or pc(a) over the columns of the group
};

float* partial(float* sums, int row, int tile) { return sums + (row * kTiles + tile) * kTileRows; }

__m512 load_scale(const Task& task, int64_t column, int64_t group, __mmask16 lanes) {
  if (task.groups == 1) return _mm512_maskz_loadu_ps(lanes, task.p.scale + column);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(task.groups)));
  const float* first = task.p.scale + column * task.groups + group;
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, index, first, 4);
}

template <Operand operand>
__m512i to_dot(__m512i counts, __m512i present) {
  const __m512i twice = _mm512_add_epi32(counts, counts);
  return operand == Operand::bool_ ? _mm512_sub_epi32(twice, present) : _mm512_sub_epi32(present, twice);
}

// Integer sums of one row and one tile to dot products, or to the float result. `sums` carries a float from group to
// group.
template <Operand operand>
void finish(const Task& task, int64_t row, int64_t tile, int64_t group, __m512i counts, float* sums) {
  const BinaryMatmulParams& p = task.p;
  const int64_t column = tile * kTileRows, left = p.n - column;
  const __mmask16 lanes = first_lanes(left);
  const __m512i present = _mm512_set1_epi32(task.present[row * task.groups + group]);
  const __m512i dot = to_dot<operand>(counts, present);
  if (p.dot) return _mm512_mask_storeu_epi32(p.dot + row * p.n + column, lanes, dot);
  __m512 scale = load_scale(task, column, group, lanes);
  if (p.row_scale) scale = _mm512_mul_ps(scale, _mm512_set1_ps(p.row_scale[row]));
  __m512 value = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(dot));
  if (group > 0) value = _mm512_add_ps(_mm512_loadu_ps(sums), value);
  if (group + 1 < task.groups) return _mm512_storeu_ps(sums, value);
  if (p.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, p.bias + column));
  with_dtype(p.out_dtype, p.out, [&](auto* out) { store16(out + row * p.n + column, lanes, value); });
}

// Whole tiles and one group of columns: integers or float32 of `rows` rows without masks. Scale and bias are loaded
// once.
template <Operand operand, int rows>
inline __attribute__((always_inline)) void finish_whole(const Task& task, int64_t row, int64_t column, const Row& r0,
                                                        const Row& r1, const Row& r2, const Row& r3) {
  const BinaryMatmulParams& p = task.p;
  const auto each_row = [&](const auto& write) {
    write(row, r0);
    if constexpr (rows > 1) {
      write(row + 1, r1);
      write(row + 2, r2);
      write(row + 3, r3);
    }
  };
  if (p.dot) {
    each_row([&](int64_t i, const Row& counts) {
      const __m512i present = _mm512_set1_epi32(task.present[i]);
      int32_t* out = p.dot + i * p.n + column;
      _mm512_storeu_si512(out, to_dot<operand>(counts.c0, present));
      _mm512_storeu_si512(out + kTileRows, to_dot<operand>(counts.c1, present));
      _mm512_storeu_si512(out + 2 * kTileRows, to_dot<operand>(counts.c2, present));
      _mm512_storeu_si512(out + 3 * kTileRows, to_dot<operand>(counts.c3, present));
    });
    return;
  }
  const auto load4 = [&](const float* x, int i) { return _mm512_loadu_ps(x + column + i * kTileRows); };
  const __m512 zero = _mm512_set1_ps(-0.0f);  // x + -0 is x, for every x
  const __m512 s0 = load4(p.scale, 0), s1 = load4(p.scale, 1), s2 = load4(p.scale, 2), s3 = load4(p.scale, 3);
  const __m512 b0 = p.bias ? load4(p.bias, 0) : zero, b1 = p.bias ? load4(p.bias, 1) : zero;
  const __m512 b2 = p.bias ? load4(p.bias, 2) : zero, b3 = p.bias ? load4(p.bias, 3) : zero;
  each_row([&](int64_t i, const Row& counts) {
    const __m512i present = _mm512_set1_epi32(task.present[i]);
    const __m512 factor = _mm512_set1_ps(p.row_scale ? p.row_scale[i] : 1.0f);  // times 1 is exact
    float* out = static_cast<float*>(p.out) + i * p.n + column;
    const auto write = [&](int at, __m512i count, __m512 scale, __m512 bias) {
      const __m512 dot = _mm512_cvtepi32_ps(to_dot<operand>(count, present));
      _mm512_storeu_ps(out + at, _mm512_add_ps(_mm512_mul_ps(_mm512_mul_ps(scale, factor), dot), bias));
    };
    write(0, counts.c0, s0, b0);
    write(kTileRows, counts.c1, s1, b1);
    write(2 * kTileRows, counts.c2, s2, b2);
    write(3 * kTileRows, counts.c3, s3, b3);
  });
}

// Any tile, any number of groups, any dtype.
template <Operand operand>
void finish_row(const Task& task, int64_t row, int64_t tile, int64_t group, Row counts, float* sums) {
  finish<operand>(task, row, tile, group, counts.c0, sums);
  if (tile + 1 < task.end) finish<operand>(task, row, tile + 1, group, counts.c1, sums + kTileRows);
  if (tile + 2 < task.end) finish<operand>(task, row, tile + 2, group, counts.c2, sums + 2 * kTileRows);
  if (tile + 3 < task.end) finish<operand>(task, row, tile + 3, group, counts.c3, sums + 3 * kTileRows);
}

template <Operand operand, int rows>
void block(const Task& task, int64_t row, int64_t tile) {
  const BinaryMatmulParams& p = task.p;
  const int64_t last = task.end - 1;
  const auto tile_at = [&](int64_t t) { return p.weight + (t < last ? t : last) * task.words * kTileRows; };
  const int32_t *w0 = tile_at(tile), *w1 = tile_at(tile + 1), *w2 = tile_at(tile + 2), *w3 = tile_at(tile + 3);
  const int32_t* a0 = p.a + row * task.words;
  const int32_t* z0 = operand == Operand::ternary ? p.a_nonzero + row * task.words : a0;
  const int64_t next = task.words;
  const bool whole = tile + kTiles <= task.end && (tile + kTiles) * kTileRows <= p.n && task.groups == 1 &&
                     (p.dot || p.out_dtype == Dtype::f32);
  float sums[4 * kTiles * kTileRows];
  for (int64_t group = 0; group < task.groups; ++group) {
    const __m512i zero = _mm512_setzero_si512();
    Row r0{zero, zero, zero, zero}, r1 = r0, r2 = r0, r3 = r0;
    const int64_t begin = group * task.group_words;
    const int64_t end = begin + task.group_words < task.words ? begin + task.group_words : task.words;
    for (int64_t w = begin; w < end; ++w) {
      const __m512i v0 = _mm512_loadu_si512(w0 + w * kTileRows), v1 = _mm512_loadu_si512(w1 + w * kTileRows);
      const __m512i v2 = _mm512_loadu_si512(w2 + w * kTileRows), v3 = _mm512_loadu_si512(w3 + w * kTileRows);
      step<operand>(r0, a0[w], z0[w], v0, v1, v2, v3);
      if constexpr (rows > 1) {
        step<operand>(r1, a0[w + next], z0[w + next], v0, v1, v2, v3);
        step<operand>(r2, a0[w + 2 * next], z0[w + 2 * next], v0, v1, v2, v3);
        step<operand>(r3, a0[w + 3 * next], z0[w + 3 * next], v0, v1, v2, v3);
      }
    }
    if (whole) {
      finish_whole<operand, rows>(task, row, tile * kTileRows, r0, r1, r2, r3);
      continue;
    }
    finish_row<operand>(task, row, tile, group, r0, sums);
    if constexpr (rows > 1) {
      finish_row<operand>(task, row + 1, tile, group, r1, partial(sums, 1, 0));
      finish_row<operand>(task, row + 2, tile, group, r2, partial(sums, 2, 0));
      finish_row<operand>(task, row + 3, tile, group, r3, partial(sums, 3, 0));
    }
  }
}

template <int rows>
void block(const Task& task, int64_t row, int64_t tile) {
  Operand operand = task.p.operand;
  if (operand == Operand::ternary) {  // rows without a zero are plain signs
    int64_t present = 0;
    for (int64_t i = row * task.groups; i < (row + rows) * task.groups; ++i) present += task.present[i];
    if (present == rows * task.p.k) operand = Operand::sign;
  }
  switch (operand) {
    case Operand::sign:
      return block<Operand::sign, rows>(task, row, tile);
    case Operand::ternary:
      return block<Operand::ternary, rows>(task, row, tile);
    case Operand::bool_:
      return block<Operand::bool_, rows>(task, row, tile);
  }
}

}  // namespace

void binary_matmul_tiles_avx512(const BinaryMatmulParams& p, int64_t begin, int64_t end) {
  if (p.weight_nonzero || p.k == 0) return binary_matmul_tiles_generic(p, begin, end);
  const int64_t words = word_count(p.k);
  const int64_t group_words = p.group_size > 0 && !p.dot ? p.group_size / 32 : words;
  const int64_t groups = ceil_div(words, group_words);
  int32_t* present = new int32_t[p.m * groups];
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
  const Task task{p, words, groups, group_words, end, present};
  for (int64_t tile = begin; tile < end; tile += kTiles) {
    int64_t row = 0;
    for (; row + 4 <= p.m; row += 4) block<4>(task, row, tile);
    for (; row < p.m; ++row) block<1>(task, row, tile);
  }
  delete[] present;
}

}  // namespace bitmill::detail
