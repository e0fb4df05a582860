// SPDX-License-Identifier: Apache-2.0
// Counting three words of signs in 8 operations instead of 9. Where a row and a weight differ is x = a ^ w. Of three
// such words the count is that of their parity, x0 ^ x1 ^ x2, and twice that of their majority. The parity is that of
// the row, a0 ^ a1 ^ a2, against that of the weight: one xor, if both have it in place of the first word, which nobody
// needs any more, since the majority follows from x1, x2 and the parity. So of three words there are 3 xors, 1
// majority, 2 popcounts and 2 sums, the second of which doubles. Rows and weights are prepared for it, which a few
// dozen rows repay.
#include "avx512.h"
#include "binary_blocks_avx512.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

// The majority of x0, x1, x2, at bit 4 x1 + 2 x2 + (x0 ^ x1 ^ x2) of the table.
constexpr int majority_table() {
  int table = 0;
  for (int i = 0; i < 8; ++i) {
    const int x1 = i >> 2 & 1, x2 = i >> 1 & 1, x0 = (i & 1) ^ x1 ^ x2;
    table |= (x0 + x1 + x2 >= 2) << i;
  }
  return table;
}

struct Triple {
  __m512i parity, second, third;
};

Triple load_row(const int32_t* a) {
  return {_mm512_set1_epi32(a[0]), _mm512_set1_epi32(a[1]), _mm512_set1_epi32(a[2])};
}

Triple load_weight(const int32_t* weight) {
  return {_mm512_loadu_si512(weight), _mm512_loadu_si512(weight + kTileRows),
          _mm512_loadu_si512(weight + 2 * kTileRows)};
}

__m512i count(__m512i sum, const Triple& a, const Triple& w, __m512i two) {
  const __m512i parity = _mm512_xor_si512(a.parity, w.parity);
  const __m512i second = _mm512_xor_si512(a.second, w.second), third = _mm512_xor_si512(a.third, w.third);
  const __m512i majority = _mm512_ternarylogic_epi64(second, third, parity, majority_table());
  sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(parity));
  sum = _mm512_dpwssd_epi32(sum, _mm512_popcnt_epi32(majority), two);
  asm volatile("" : "+v"(sum));  // keeps the operations of one output together, or g++ runs out of registers
  return sum;
}

__m512i count(__m512i sum, __m512i a, __m512i w) {
  sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_xor_si512(a, w)));
  asm volatile("" : "+v"(sum));
  return sum;
}

// Three words of two rows and every tile.
template <int tiles>
[[gnu::always_inline]] inline void add_triple(Row& r0, Row& r1, const int32_t* a0, const int32_t* a1,
                                              const int32_t* weight, __m512i two) {
  const Triple row0 = load_row(a0), row1 = load_row(a1);
  const auto tile = [&](int t, __m512i& c0, __m512i& c1) __attribute__((always_inline)) {
    Triple w = load_weight(weight + 3 * t * kTileRows);
    asm volatile("" : "+v"(w.parity), "+v"(w.second), "+v"(w.third));  // loaded once, not for each row
    c0 = count(c0, row0, w, two);
    c1 = count(c1, row1, w, two);
  };
  tile(0, r0.c0, r1.c0);
  if constexpr (tiles > 1) tile(1, r0.c1, r1.c1);
  if constexpr (tiles > 2) tile(2, r0.c2, r1.c2);
  if constexpr (tiles > 3) tile(3, r0.c3, r1.c3);
}

template <int tiles>
[[gnu::always_inline]] inline void add_word(Row& row, int32_t word, const int32_t* weight) {
  const __m512i a = _mm512_set1_epi32(word);
  row.c0 = count(row.c0, a, _mm512_loadu_si512(weight));
  if constexpr (tiles > 1) row.c1 = count(row.c1, a, _mm512_loadu_si512(weight + kTileRows));
  if constexpr (tiles > 2) row.c2 = count(row.c2, a, _mm512_loadu_si512(weight + 2 * kTileRows));
  if constexpr (tiles > 3) row.c3 = count(row.c3, a, _mm512_loadu_si512(weight + 3 * kTileRows));
}

// Rows [begin, end), kBlockRows at a time: finish(row, counts of its first row, ..., of its last).
template <int tiles, class Finish>
void count_rows(const BinaryTask& task, const BinaryColumns& c, int64_t begin, int64_t end, const Finish finish) {
  const int64_t words = task.words, whole = words / 3 * 3;
  const int32_t* a = task.triples + (begin - task.triples_from) * words;
  __m512i two = _mm512_set1_epi32(2);
  asm volatile("" : "+v"(two));  // a register
  // weights of the next tiles, which the first rows ask for, each block as many lines
  const int64_t lines = task.triples_from == 0 ? ceil_div(tiles * words, (end - begin) / kBlockRows) : 0;
  const int32_t* ahead = c.weight[0] + tiles * words * kTileRows;
  for (int64_t row = begin; row < end; row += kBlockRows, a += kBlockRows * words) {
    const int32_t *const a1 = a + words, *const a2 = a1 + words, *const a3 = a2 + words, *weight = c.triples;
    if (task.far) request<kBlockRows, tiles>(row_of_output(task, c, row), task.p.n);
    for (int64_t i = 0; i < lines; ++i, ahead += kTileRows) __builtin_prefetch(ahead, 0, 2);
    const __m512i zero = _mm512_setzero_si512();
    Row r0{zero, zero, zero, zero, zero}, r1 = r0, r2 = r0, r3 = r0;
    for (int64_t w = 0; w < whole; w += 3, weight += 3 * tiles * kTileRows) {
      add_triple<tiles>(r0, r1, a + w, a1 + w, weight, two);
      add_triple<tiles>(r2, r3, a2 + w, a3 + w, weight, two);
    }
    for (int64_t w = whole; w < words; ++w, weight += tiles * kTileRows) {
      add_word<tiles>(r0, a[w], weight);
      add_word<tiles>(r1, a1[w], weight);
      add_word<tiles>(r2, a2[w], weight);
      add_word<tiles>(r3, a3[w], weight);
    }
    finish(row, r0, r1, r2, r3);
  }
}

// To any result. Those below leave out what theirs does not need.
template <int tiles>
struct ToAny {
  const BinaryTask& task;
  const BinaryColumns& c;

  [[gnu::always_inline]] void operator()(int64_t row, const Row& r0, const Row& r1, const Row& r2,
                                         const Row& r3) const {
    finish_block<Operand::sign, kBlockRows, tiles>(task, c, row, 0, r0, r1, r2, r3, nullptr);
  }
};

template <int tiles>
struct ToIntegers {
  int32_t* out;
  int64_t n;
  __m512i k;

  [[gnu::always_inline]] void operator()(int64_t row, const Row& r0, const Row& r1, const Row& r2,
                                         const Row& r3) const {
    const auto put = [this, to = out + row * n](int r, int t, __m512i counts) __attribute__((always_inline)) {
      _mm512_storeu_si512(to + r * n + t * kTileRows, _mm512_sub_epi32(k, _mm512_add_epi32(counts, counts)));
    };
    put_rows<tiles>(put, r0, r1, r2, r3);
  }
};

template <int tiles>
struct ToFloats {
  float* out;
  int64_t n;
  __m512 k;
  const BinaryColumns& c;

  [[gnu::always_inline]] void operator()(int64_t row, const Row& r0, const Row& r1, const Row& r2,
                                         const Row& r3) const {
    const auto put = [this, to = out + row * n](int r, int t, __m512i counts) __attribute__((always_inline)) {
      _mm512_storeu_ps(to + r * n + t * kTileRows, scaled(counts, k, c.scale[t], c.bias[t]));
    };
    put_rows<tiles>(put, r0, r1, r2, r3);
  }
};

// Through memory: the constants of rounding would take registers of the counts.
template <int tiles, class T>
struct ToHalves {
  T* out;
  int64_t n;
  float k;
  const BinaryColumns& c;

  [[gnu::noinline]] void round(const __m512i (&counts)[kBlockRows][tiles], T* to) const {
    for (int r = 0; r < kBlockRows; ++r, to += n) {
#pragma GCC unroll 4
      for (int t = 0; t < tiles; ++t) {
        store16(to + t * kTileRows, 0xFFFF, scaled(counts[r][t], _mm512_set1_ps(k), c.scale[t], c.bias[t]));
      }
    }
  }

  [[gnu::always_inline]] void operator()(int64_t row, const Row& r0, const Row& r1, const Row& r2,
                                         const Row& r3) const {
    __m512i all[kBlockRows][tiles];
    put_rows<tiles>([&](int r, int t, __m512i counts) __attribute__((always_inline)) { all[r][t] = counts; }, r0, r1,
                    r2, r3);
    round(all, out + row * n);
  }
};

template <int tiles>
void rows(const BinaryTask& task, const BinaryColumns& c, int64_t begin, int64_t end) {
  const BinaryMatmulParams& p = task.p;
  const auto count = [&](const auto& finish) { count_rows<tiles>(task, c, begin, end, finish); };
  if (p.bits.sign || c.lanes != 0xFFFF || p.row_scale || p.residual) return count(ToAny<tiles>{task, c});
  const int32_t k = static_cast<int32_t>(p.k);
  if (p.dot) return count(ToIntegers<tiles>{p.dot + c.first, p.n, _mm512_set1_epi32(k)});
  with_dtype(p.out_dtype, p.out, [&]<class T>(T* out) {
    if constexpr (sizeof(T) == sizeof(float)) {
      count(ToFloats<tiles>{out + c.first, p.n, _mm512_set1_ps(static_cast<float>(k)), c});
    } else {
      count(ToHalves<tiles, T>{out + c.first, p.n, static_cast<float>(k), c});
    }
  });
}

}  // namespace

// [rows, words]: the first of three words is their parity, and what is left of a row remains.
void prepare_rows_of_triples_avx512vnni(const int32_t* a, int64_t rows, int64_t words, int32_t* triples) {
  const int64_t whole = words / 3 * 3;
  for (int64_t row = 0; row < rows; ++row, a += words, triples += words) {
    for (int64_t w = 0; w < words; w += 15) {  // five triples
      const __mmask16 all = first_lanes(words - w < 15 ? words - w : 15), firsts = 0x1249 & first_lanes(whole - w);
      const __m512i second = _mm512_maskz_loadu_epi32(firsts, a + w + 1);
      const __m512i third = _mm512_maskz_loadu_epi32(firsts, a + w + 2);
      const __m512i word = _mm512_maskz_loadu_epi32(all, a + w);
      _mm512_mask_storeu_epi32(triples + w, all, _mm512_ternarylogic_epi32(word, second, third, 0x96));
    }
  }
}

// [words / 3, tiles, 3, 16], and [words % 3, tiles, 16].
void prepare_columns_of_triples_avx512vnni(const BinaryColumns& columns, int tiles, int64_t words, int32_t* triples) {
  const int64_t whole = words / 3 * 3;
  for (int t = 0; t < tiles; ++t) {
    const int32_t* const weight = columns.weight[t];
    for (int64_t w = 0; w < whole; w += 3) {
      const Triple x = load_weight(weight + w * kTileRows);
      int32_t* const to = triples + (w * tiles + 3 * t) * kTileRows;
      _mm512_storeu_si512(to, _mm512_ternarylogic_epi32(x.parity, x.second, x.third, 0x96));
      _mm512_storeu_si512(to + kTileRows, x.second);
      _mm512_storeu_si512(to + 2 * kTileRows, x.third);
    }
    for (int64_t w = whole; w < words; ++w) {
      _mm512_storeu_si512(triples + (w * tiles + t) * kTileRows, _mm512_loadu_si512(weight + w * kTileRows));
    }
  }
}

// Rows [begin, end) of signs, a multiple of kBlockRows, times at most 4 tiles; one group.
void binary_triples_avx512vnni(const BinaryTask& task, const BinaryColumns& columns, int tiles, int64_t begin,
                               int64_t end) {
  if (tiles == 4) return rows<4>(task, columns, begin, end);
  if (tiles == 3) return rows<3>(task, columns, begin, end);
  if (tiles == 2) return rows<2>(task, columns, begin, end);
  rows<1>(task, columns, begin, end);
}

}  // namespace bitmill::detail
