// SPDX-License-Identifier: Apache-2.0
// Few rows of int8 activations times bits, without unpacking a bit: byte b of a word masked with 1 << j holds the
// weight of column 8 b + j times 2^j, and vpdpbusd multiplies the four bytes with the activations of those columns. 8
// sums, one for each j, are shifted right by j and added at the end. Two tiles share the activations.
#include "binary_int8_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int kTilePair = 2;
constexpr int64_t kPrefetchWords = 96;             // 6 KiB ahead in either tile
constexpr int64_t kWordsBeforeOverflow = 1 << 14;  // 4 x 128 x 127 a word, within 2^31

// Columns of a word in the order of the sums: dword j holds columns j, 8 + j, 16 + j, 24 + j. Columns past k are 0.
void arrange(const int8_t* q, int64_t k, int32_t* out) {
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t column = 0; column < k; column += 32) {
    const int64_t left = k - column;
    const __mmask32 bytes = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    // dwords (0, 2, 4, 6 | 1, 3, 5, 7): every second dword is the lower half of a row of 8 columns
    const __m256i rows = _mm256_maskz_loadu_epi8(bytes, q + column);
    const __m256i halves = _mm256_permutevar8x32_epi32(rows, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + column / 4), _mm256_shuffle_epi8(halves, order));
  }
}

struct Sums {  // named, not an array: g++ keeps an indexed array of accumulators in memory
  __m512i s0, s1, s2, s3, s4, s5, s6, s7;
};

// Bit j of a word of either tile.
template <int j>
void add_bit(__m512i& a, __m512i& b, __m512i x, __m512i y, const int32_t* q) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(1 << j)), activations = _mm512_set1_epi32(q[j]);
  a = _mm512_dpbusd_epi32(a, _mm512_and_si512(x, mask), activations);
  b = _mm512_dpbusd_epi32(b, _mm512_and_si512(y, mask), activations);
  asm volatile("" : "+v"(a), "+v"(b));  // one bit after the other; otherwise g++ runs out of registers
}

__m512i join(const Sums& s) {
  const __m512i a = _mm512_add_epi32(s.s0, _mm512_srai_epi32(s.s1, 1));
  const __m512i b = _mm512_add_epi32(_mm512_srai_epi32(s.s2, 2), _mm512_srai_epi32(s.s3, 3));
  const __m512i c = _mm512_add_epi32(_mm512_srai_epi32(s.s4, 4), _mm512_srai_epi32(s.s5, 5));
  const __m512i d = _mm512_add_epi32(_mm512_srai_epi32(s.s6, 6), _mm512_srai_epi32(s.s7, 7));
  return _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
}

void pair_of_tiles(const Int8Task& task, int64_t row, int64_t tile, const int32_t* q) {
  const int32_t *w0 = task.tile(tile), *w1 = task.tile(tile + 1);
  float partial[kTilePair][kTileRows];
  for (int64_t group = 0; group < task.groups; ++group) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i plus0 = zero, plus1 = zero;
    const int64_t end = task.group_end(group);
    for (int64_t w = group * task.group_words; w < end;) {
      const int64_t pause = w + kWordsBeforeOverflow < end ? w + kWordsBeforeOverflow : end;
      Sums a{zero, zero, zero, zero, zero, zero, zero, zero}, b = a;
      for (; w < pause; ++w) {
        const __m512i x = _mm512_loadu_si512(w0 + w * kTileRows), y = _mm512_loadu_si512(w1 + w * kTileRows);
        const int64_t next = w + kPrefetchWords,
                      ahead = next < task.words ? next : next + task.words;  // of the next pair
        _mm_prefetch(reinterpret_cast<const char*>(w0 + ahead * kTileRows), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(w1 + ahead * kTileRows), _MM_HINT_T1);
        add_bit<0>(a.s0, b.s0, x, y, q + 8 * w);
        add_bit<1>(a.s1, b.s1, x, y, q + 8 * w);
        add_bit<2>(a.s2, b.s2, x, y, q + 8 * w);
        add_bit<3>(a.s3, b.s3, x, y, q + 8 * w);
        add_bit<4>(a.s4, b.s4, x, y, q + 8 * w);
        add_bit<5>(a.s5, b.s5, x, y, q + 8 * w);
        add_bit<6>(a.s6, b.s6, x, y, q + 8 * w);
        add_bit<7>(a.s7, b.s7, x, y, q + 8 * w);
      }
      plus0 = _mm512_add_epi32(plus0, join(a));
      plus1 = _mm512_add_epi32(plus1, join(b));
    }
    finish(task, row, tile, group, plus0, partial[0]);
    finish(task, row, tile + 1, group, plus1, partial[1]);
  }
}

}  // namespace

void binary_int8_matmul_tiles_avx512vnni(const BinaryInt8MatmulParams& p, int64_t begin, int64_t end) {
  const int64_t groups = p.group_size > 0 ? ceil_div(p.k, p.group_size) : 1;
  const Scratch<int32_t> total(p.m * groups);
  const Int8Task task = make_int8_task(p, end, total);
  const Scratch<int32_t> q(8 * task.words);
  for (int64_t row = 0; row < p.m; ++row) {
    arrange(p.q + row * p.k, p.k, q);
    for (int64_t tile = begin; tile < end; tile += kTilePair) pair_of_tiles(task, row, tile, q);
  }
}

}  // namespace bitmill::detail
