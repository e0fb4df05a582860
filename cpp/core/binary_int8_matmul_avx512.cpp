// SPDX-License-Identifier: Apache-2.0
// int8 activations times bits by table lookup. A word of a tile is two 16-bit lanes of one output; vpermw fetches, for
// 4 columns in either half, the sum of the activations whose bit is set from a table of 2 x 16 sums. 16-bit sums hold
// 16 words; then a multiply-add by 1 joins the halves to 32 bits. 8 rows share the prepared bits of 2 tiles.
#include "binary_int8_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kTables = 4;                   // tables a word
constexpr int64_t kTableEntries = 32 * kTables;  // int16 entries of tables a word
constexpr int64_t kWordsBeforeOverflow = 16;     // 16 words x 4 lookups x 4 x 127 < 2^15

// The tables of one row, [words][4][32]: entry i of table j is the sum of columns 4j ... 4j + 3 of the word whose bit
// in i is set, entry 16 + i the same of columns 16 + 4j ... . Columns from `count` on are 0.
void build_tables(const int8_t* q, int64_t k, int16_t* tables) {
  alignas(64) int8_t low_bits[64], high_bits[64];  // of a lane's number: bits 0, 1 and bits 2, 3, one a byte
  for (int lane = 0; lane < 32; ++lane) {
    for (int bit = 0; bit < 2; ++bit) {
      low_bits[2 * lane + bit] = static_cast<int8_t>((lane >> bit) & 1);
      high_bits[2 * lane + bit] = static_cast<int8_t>((lane >> (bit + 2)) & 1);
    }
  }
  const __m512i low = _mm512_load_si512(low_bits), high = _mm512_load_si512(high_bits);
  // 16-bit pairs of the row's 32 bytes: pair 2j (columns 4j, 4j + 1) for entries 0 ... 15, pair 8 + 2j for the others.
  const __m512i halves = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(8), 1);
  for (int64_t column = 0; column < k; column += 32) {
    const int64_t left = k - column;
    const __mmask32 bytes = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    const __m512i pairs = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(bytes, q + column));
    for (int j = 0; j < kTables; ++j) {
      const __m512i index = _mm512_add_epi16(halves, _mm512_set1_epi16(static_cast<int16_t>(2 * j)));
      const __m512i first = _mm512_permutexvar_epi16(index, pairs);
      const __m512i second = _mm512_permutexvar_epi16(_mm512_add_epi16(index, _mm512_set1_epi16(1)), pairs);
      const __m512i sums = _mm512_add_epi16(_mm512_maddubs_epi16(low, first), _mm512_maddubs_epi16(high, second));
      _mm512_store_si512(tables + (column / 32) * kTableEntries + 32 * j, sums);
    }
  }
}

constexpr int kTilePair = 2;

struct Pair {  // 16-bit sums of one row and two tiles; named, not an array: g++ keeps indexed accumulators in memory
  __m512i s0, s1;
};

void look_up(Pair& sum, const int16_t* table, __m512i index0, __m512i index1) {
  __m512i entries = _mm512_load_si512(table);
  asm volatile("" : "+v"(entries));  // loaded once, not by both lookups
  sum.s0 = _mm512_add_epi16(sum.s0, _mm512_permutexvar_epi16(index0, entries));
  sum.s1 = _mm512_add_epi16(sum.s1, _mm512_permutexvar_epi16(index1, entries));
  asm volatile("" : "+v"(sum.s0), "+v"(sum.s1));  // keeps lookup and sum together; otherwise registers run out
}

// Two tiles side by side; 32-bit sums of a row are kept in memory between the pauses of the 16-bit ones.
struct alignas(64) Joined {
  int32_t plus[kTilePair][kTileRows];

  void add(Pair sum, bool first) {
    const __m512i ones = _mm512_set1_epi16(1), zero = _mm512_setzero_si512();
    const __m512i before0 = first ? zero : _mm512_load_si512(plus[0]);
    const __m512i before1 = first ? zero : _mm512_load_si512(plus[1]);
    _mm512_store_si512(plus[0], _mm512_add_epi32(before0, _mm512_madd_epi16(sum.s0, ones)));
    _mm512_store_si512(plus[1], _mm512_add_epi32(before1, _mm512_madd_epi16(sum.s1, ones)));
  }
};

// The two tiles of `count` rows, whole, as float32 and with one group.
void finish_whole(const Int8Task& task, int64_t row, int64_t count, int64_t tile, const Joined* joined) {
  const BinaryInt8MatmulParams& p = task.p;
  const int64_t column = tile * kTileRows;
  const __m512 none = _mm512_set1_ps(-0.0f);  // x + -0 is x, for every x
  const __m512 scale0 = _mm512_loadu_ps(p.scale + column), scale1 = _mm512_loadu_ps(p.scale + column + kTileRows);
  const __m512 bias0 = p.bias ? _mm512_loadu_ps(p.bias + column) : none;
  const __m512 bias1 = p.bias ? _mm512_loadu_ps(p.bias + column + kTileRows) : none;
  for (int64_t r = 0; r < count; ++r) {
    const __m512 factor = _mm512_set1_ps(p.row_scale[row + r]);
    const __m512 dot0 = to_dot(task, row + r, 0, _mm512_load_si512(joined[r].plus[0]));
    const __m512 dot1 = to_dot(task, row + r, 0, _mm512_load_si512(joined[r].plus[1]));
    float* out = static_cast<float*>(p.out) + (row + r) * p.n + column;
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_mul_ps(_mm512_mul_ps(scale0, factor), dot0), bias0));
    _mm512_storeu_ps(out + kTileRows, _mm512_add_ps(_mm512_mul_ps(_mm512_mul_ps(scale1, factor), dot1), bias1));
  }
}

template <int rows>
[[gnu::noinline]] void block(const Int8Task& task, int64_t row, int64_t count, int64_t tile, const int16_t* tables,
                             Joined* joined) {
  static_assert(rows == 8 || rows == 4);
  const int32_t *weight0 = task.tile(tile), *weight1 = task.tile(tile + 1);
  const int64_t stride = task.words * kTableEntries;
  const __m512i nibble = _mm512_set1_epi16(15), upper = _mm512_set1_epi32(16 << 16);
  const __m512i sixteenth = _mm512_set1_epi16(1 << 12), zero = _mm512_setzero_si512();
  const bool whole = task.groups == 1 && task.p.out_dtype == Dtype::f32 && tile + kTilePair <= task.end &&
                     (tile + kTilePair) * kTileRows <= task.p.n;
  float partial[rows][kTilePair][kTileRows];
  if (whole) {  // the lines that this block is going to write arrive while it is computed
    const float* out = static_cast<const float*>(task.p.out) + row * task.p.n + tile * kTileRows;
    for (int64_t r = 0; r < count; ++r, out += task.p.n) {
      __builtin_prefetch(out, 1);
      __builtin_prefetch(out + kTileRows, 1);
    }
  }
  for (int64_t group = 0; group < task.groups; ++group) {
    const int64_t begin = group * task.group_words, end = task.group_end(group);
    for (int64_t w = begin; w < end;) {
      const int64_t pause = w + kWordsBeforeOverflow < end ? w + kWordsBeforeOverflow : end;
      const bool first = w == begin;
      Pair r0{zero, zero}, r1 = r0, r2 = r0, r3 = r0, r4 = r0, r5 = r0, r6 = r0, r7 = r0;
      for (; w < pause; ++w) {
        __m512i word0 = _mm512_loadu_si512(weight0 + w * kTileRows);
        __m512i word1 = _mm512_loadu_si512(weight1 + w * kTileRows);
        const int16_t *table = tables + w * kTableEntries, *last = table + kTableEntries;
        for (; table != last; table += 32) {
          // 4 bits of either half, and a 16 in the upper one
          const __m512i index0 = _mm512_ternarylogic_epi32(word0, nibble, upper, 0xEA);  // (word & nibble) | upper
          const __m512i index1 = _mm512_ternarylogic_epi32(word1, nibble, upper, 0xEA);
          // this shift by 4 is a high product, which leaves the units of the lookups to the lookups
          word0 = _mm512_mulhi_epu16(word0, sixteenth);
          word1 = _mm512_mulhi_epu16(word1, sixteenth);
          look_up(r0, table, index0, index1);
          look_up(r1, table + stride, index0, index1);
          look_up(r2, table + 2 * stride, index0, index1);
          look_up(r3, table + 3 * stride, index0, index1);
          if constexpr (rows == 8) {
            look_up(r4, table + 4 * stride, index0, index1);
            look_up(r5, table + 5 * stride, index0, index1);
            look_up(r6, table + 6 * stride, index0, index1);
            look_up(r7, table + 7 * stride, index0, index1);
          }
        }
      }
      joined[0].add(r0, first), joined[1].add(r1, first), joined[2].add(r2, first), joined[3].add(r3, first);
      if constexpr (rows == 8) {
        joined[4].add(r4, first), joined[5].add(r5, first), joined[6].add(r6, first), joined[7].add(r7, first);
      }
    }
    if (whole) return finish_whole(task, row, count, tile, joined);
    for (int r = 0; r < count; ++r) {
      for (int t = 0; t < kTilePair; ++t) {
        finish(task, row + r, tile + t, group, _mm512_load_si512(joined[r].plus[t]), partial[r][t]);
      }
    }
  }
}

}  // namespace

void binary_int8_matmul_tiles_avx512(const BinaryInt8MatmulParams& p, int64_t begin, int64_t end) {
  const int64_t groups = p.group_size > 0 ? ceil_div(p.k, p.group_size) : 1;
  int32_t* total = new int32_t[p.m * groups];
  const Int8Task task = make_int8_task(p, end, total);
  const int64_t stride = task.words * kTableEntries;
  int16_t* tables = new (std::align_val_t{64}) int16_t[8 * stride]();
  Joined joined[8];
  for (int64_t row = 0; row < p.m; row += 8) {
    const int64_t count = p.m - row < 8 ? p.m - row : 8;
    for (int64_t r = 0; r < count; ++r) build_tables(p.q + (row + r) * p.k, p.k, tables + r * stride);
    for (int64_t tile = begin; tile < end; tile += kTilePair) {  // rows that are missing are not stored
      count > 4 ? block<8>(task, row, count, tile, tables, joined) : block<4>(task, row, count, tile, tables, joined);
    }
  }
  ::operator delete[](tables, std::align_val_t{64});
  delete[] total;
}

}  // namespace bitmill::detail
