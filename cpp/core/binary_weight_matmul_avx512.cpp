// SPDX-License-Identifier: Apache-2.0
// Float activations times 1-bit weights by table lookup (lookup_tables_avx512.h). 4 rows share the shifted bits of 4
// tiles; a single row takes 8 tiles and runs at the speed of memory. Exact float32 activations.
#include "avx512.h"
#include "binary_matmul.h"
#include "layout.h"
#include "lookup_tables_avx512.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int kTiles = 4;               // tiles side by side for 4 rows
constexpr int kSingleTiles = 8;         // tiles side by side for a single row
constexpr int64_t kPrefetchWords = 48;  // how far ahead a single row asks for its bits: 3 KiB a tile

struct Task {
  const BinaryWeightMatmulParams& p;
  int64_t words, groups, group_words;
  int64_t end;  // the first tile that belongs to somebody else

  int64_t group_end(int64_t group) const {
    const int64_t last = (group + 1) * group_words;
    return last < words ? last : words;
  }
  const int32_t* tile(int64_t t) const { return p.weight + (t < end ? t : end - 1) * words * kTileRows; }
};

template <class T>
void finish(const Task& task, int64_t row, int64_t tile, __m512 value) {
  const BinaryWeightMatmulParams& p = task.p;
  const int64_t column = tile * kTileRows;
  const __mmask16 lanes = first_lanes(p.n - column);
  if (p.addend) value = _mm512_add_ps(value, _mm512_loadu_ps(p.addend.at(row, tile)));
  if (p.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, p.bias + column));
  store16(static_cast<T*>(p.out) + row * p.n + column, lanes, value);
}

// One group's sums of a row and a tile. `partial` carries a float from group to group.
template <class T>
void scale_and_finish(const Task& task, int64_t row, int64_t tile, int64_t group, __m512 sum, float* partial) {
  if (tile >= task.end) return;
  const int64_t column = tile * kTileRows;
  __m512 value =
      _mm512_mul_ps(load_scale(task.p.scale, task.groups, column, group, first_lanes(task.p.n - column)), sum);
  value = _mm512_add_ps(group > 0 ? _mm512_loadu_ps(partial) : _mm512_setzero_ps(), value);
  if (group + 1 < task.groups) {
    _mm512_storeu_ps(partial, value);
  } else {
    finish<T>(task, row, tile, value);
  }
}

struct Row {  // named, not an array: g++ keeps indexed accumulators in memory
  __m512 s0, s1, s2, s3;
};

// The same sum on two kinds of units: additions alone would wait for those that the lookups need.
void look_up(Row& row, const float* table, __m512i bits0, __m512i bits1, __m512i bits2, __m512i bits3) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 sums = _mm512_load_ps(table);
  asm volatile("" : "+v"(sums));  // loaded once, not by every lookup
  row.s0 = _mm512_add_ps(row.s0, _mm512_permutexvar_ps(bits0, sums));
  row.s1 = _mm512_fmadd_ps(_mm512_permutexvar_ps(bits1, sums), one, row.s1);
  row.s2 = _mm512_add_ps(row.s2, _mm512_permutexvar_ps(bits2, sums));
  row.s3 = _mm512_fmadd_ps(_mm512_permutexvar_ps(bits3, sums), one, row.s3);
  asm volatile("" : "+v"(row.s0), "+v"(row.s1), "+v"(row.s2), "+v"(row.s3));  // lookup and sum stay together
}

// The tiles of 4 rows, whole, as float32 and with one group.
void finish_whole(const Task& task, int64_t row, int64_t tile, Row r0, Row r1, Row r2, Row r3) {
  const BinaryWeightMatmulParams& p = task.p;
  const int64_t column = tile * kTileRows;
  const auto column_of = [&](int t, __m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 scale = _mm512_loadu_ps(p.scale + column + t * kTileRows), zero = _mm512_setzero_ps();
    const __m512 none = _mm512_set1_ps(-0.0f);  // x + -0 is x, for every x
    const __m512 bias = p.bias ? _mm512_loadu_ps(p.bias + column + t * kTileRows) : none;
    float* out = static_cast<float*>(p.out) + row * p.n + column + t * kTileRows;
    const auto put = [&](int64_t r, __m512 sum) {
      const __m512 addend = p.addend ? _mm512_loadu_ps(p.addend.at(row + r, tile + t)) : none;
      const __m512 value = _mm512_add_ps(zero, _mm512_mul_ps(scale, sum));
      _mm512_storeu_ps(out + r * p.n, _mm512_add_ps(_mm512_add_ps(value, addend), bias));
    };
    put(0, a), put(1, b), put(2, c), put(3, d);
  };
  column_of(0, r0.s0, r1.s0, r2.s0, r3.s0);
  column_of(1, r0.s1, r1.s1, r2.s1, r3.s1);
  column_of(2, r0.s2, r1.s2, r2.s2, r3.s2);
  column_of(3, r0.s3, r1.s3, r2.s3, r3.s3);
}

// 4 rows from their tables times 4 tiles side by side. Tiles past the end repeat the last one, unstored.
template <class T>
void block(const Task& task, int64_t row, int64_t tile, const float* tables) {
  const int32_t *w0 = task.tile(tile), *w1 = task.tile(tile + 1), *w2 = task.tile(tile + 2), *w3 = task.tile(tile + 3);
  const int64_t stride = task.words * kTableFloats;
  const int32_t* const next = w0 + task.words * kTiles * kTileRows;  // of the next tiles, asked for in order
  const bool whole = task.groups == 1 && task.p.dtype == Dtype::f32 && tile + kTiles <= task.end &&
                     (tile + kTiles) * kTileRows <= task.p.n;
  const __m512i sixteenth = _mm512_set1_epi16(1 << 12);
  float partial[4][kTiles][kTileRows];
  for (int64_t group = 0; group < task.groups; ++group) {
    const __m512 zero = _mm512_setzero_ps();
    Row r0{zero, zero, zero, zero}, r1 = r0, r2 = r0, r3 = r0;
    const int64_t end = task.group_end(group);
    const float* table = tables + group * task.group_words * kTableFloats;
    for (int64_t half = 2 * group * task.group_words; half < 2 * end; ++half) {  // a word is two halves of 4 tables
      const __m128i shift = _mm_cvtsi32_si128(16 * static_cast<int>(half & 1));
      const int64_t at = half / 2 * kTileRows;
      __builtin_prefetch(next + 2 * half * kTileRows, 0, 2);
      __builtin_prefetch(next + (2 * half + 1) * kTileRows, 0, 2);
      __m512i bits0 = _mm512_srl_epi32(_mm512_loadu_si512(w0 + at), shift);
      __m512i bits1 = _mm512_srl_epi32(_mm512_loadu_si512(w1 + at), shift);
      __m512i bits2 = _mm512_srl_epi32(_mm512_loadu_si512(w2 + at), shift);
      __m512i bits3 = _mm512_srl_epi32(_mm512_loadu_si512(w3 + at), shift);
      const float* last = table + kTableFloats / 2;
#pragma GCC unroll 1
      for (; table != last; table += 16) {
        look_up(r0, table, bits0, bits1, bits2, bits3);
        look_up(r1, table + stride, bits0, bits1, bits2, bits3);
        look_up(r2, table + 2 * stride, bits0, bits1, bits2, bits3);
        look_up(r3, table + 3 * stride, bits0, bits1, bits2, bits3);
        // this shift by 4 is a high product, which leaves the units of the lookups to the lookups
        bits0 = _mm512_mulhi_epu16(bits0, sixteenth), bits1 = _mm512_mulhi_epu16(bits1, sixteenth);
        bits2 = _mm512_mulhi_epu16(bits2, sixteenth), bits3 = _mm512_mulhi_epu16(bits3, sixteenth);
      }
    }
    if (whole) return finish_whole(task, row, tile, r0, r1, r2, r3);
    const auto put = [&](int r, Row sums) {
      scale_and_finish<T>(task, row + r, tile, group, sums.s0, partial[r][0]);
      scale_and_finish<T>(task, row + r, tile + 1, group, sums.s1, partial[r][1]);
      scale_and_finish<T>(task, row + r, tile + 2, group, sums.s2, partial[r][2]);
      scale_and_finish<T>(task, row + r, tile + 3, group, sums.s3, partial[r][3]);
    };
    put(0, r0), put(1, r1), put(2, r2), put(3, r3);
  }
}

struct Sums {
  __m512 s0, s1, s2, s3, s4, s5, s6, s7;
};

struct Bits {
  __m512i b0, b1, b2, b3, b4, b5, b6, b7;
};

// One table for 8 tiles. As above, sums are on two kinds of units, and the shift leaves both to them.
template <bool odd>
[[gnu::always_inline]] inline void look_up(Sums& s, Bits& b, const float* table) {
  const __m512 sums = _mm512_load_ps(table);
  const auto add = [&](__m512& sum, __m512i& bits) __attribute__((always_inline)) {
    const __m512 found = _mm512_permutexvar_ps(bits, sums);
    sum = odd ? _mm512_fmadd_ps(found, _mm512_set1_ps(1.0f), sum) : _mm512_add_ps(sum, found);
    bits = _mm512_mulhi_epu16(bits, _mm512_set1_epi16(1 << 12));
    asm volatile("" : "+v"(sum), "+v"(bits));  // lookup and sum stay together; otherwise registers run out
  };
  add(s.s0, b.b0), add(s.s1, b.b1), add(s.s2, b.b2), add(s.s3, b.b3);
  add(s.s4, b.b4), add(s.s5, b.b5), add(s.s6, b.b6), add(s.s7, b.b7);
}

// Words are loaded whole: loads that begin at a byte of a word cross lines, which takes thrice as long from memory.
[[gnu::always_inline]] inline void add_word(Sums& s, const int32_t* const (&weight)[kSingleTiles], int64_t w,
                                            const float* tables) {
#pragma GCC unroll 1
  for (int half = 0; half < 2; ++half, tables += kTableFloats / 2) {
    const __m128i shift = _mm_cvtsi32_si128(16 * half);
    const auto load = [&](int t) { return _mm512_srl_epi32(_mm512_loadu_si512(weight[t] + w * kTileRows), shift); };
    Bits b{load(0), load(1), load(2), load(3), load(4), load(5), load(6), load(7)};
    look_up<false>(s, b, tables);
    look_up<true>(s, b, tables + 16);
    look_up<false>(s, b, tables + 32);
    look_up<true>(s, b, tables + 48);
  }
}

// One row times 8 tiles side by side. Tiles past the end repeat the last one, unstored.
template <class T>
void single(const Task& task, int64_t row, int64_t tile, const float* tables) {
  const int32_t* weight[kSingleTiles];
  for (int t = 0; t < kSingleTiles; ++t) weight[t] = task.tile(tile + t);
  float partial[kSingleTiles][kTileRows];
  for (int64_t group = 0; group < task.groups; ++group) {
    const __m512 zero = _mm512_setzero_ps();
    Sums sums{zero, zero, zero, zero, zero, zero, zero, zero};
    const int64_t end = task.group_end(group);
    for (int64_t w = group * task.group_words; w < end; ++w) {
      const int64_t next = w + kPrefetchWords;
      const int64_t ahead = next < task.words ? next : next + (kSingleTiles - 1) * task.words;
      for (int t = 0; t < kSingleTiles; ++t) {
        _mm_prefetch(reinterpret_cast<const char*>(weight[t] + ahead * kTileRows), _MM_HINT_T1);
      }
      add_word(sums, weight, w, tables + w * kTableFloats);
    }
    const auto put = [&](int t, __m512 sum) { scale_and_finish<T>(task, row, tile + t, group, sum, partial[t]); };
    put(0, sums.s0), put(1, sums.s1), put(2, sums.s2), put(3, sums.s3);
    put(4, sums.s4), put(5, sums.s5), put(6, sums.s6), put(7, sums.s7);
  }
}

template <class T>
void multiply(const Task& task, int64_t begin, const T* x) {
  const BinaryWeightMatmulParams& p = task.p;
  const Scratch<float> tables(4 * task.words * kTableFloats);
  int64_t row = 0;
  for (; row + 4 <= p.m; row += 4) {
    for (int r = 0; r < 4; ++r) build_tables(x + (row + r) * p.k, p.k, tables + r * task.words * kTableFloats);
    for (int64_t tile = begin; tile < task.end; tile += kTiles) block<T>(task, row, tile, tables);
  }
  for (; row < p.m; ++row) {
    build_tables(x + row * p.k, p.k, tables);
    for (int64_t tile = begin; tile < task.end; tile += kSingleTiles) single<T>(task, row, tile, tables);
  }
}

}  // namespace

void binary_weight_matmul_tiles_avx512(const BinaryWeightMatmulParams& p, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  const int64_t group_words = p.group_size > 0 ? p.group_size / 32 : words;
  const Task task{p, words, ceil_div(words, group_words), group_words, end};
  with_dtype(p.dtype, p.x, [&](const auto* x) { multiply(task, begin, x); });
}

}  // namespace bitmill::detail
