// SPDX-License-Identifier: Apache-2.0
// Few rows of int8 activations times bits, without unpacking a bit: byte b of a word masked with 1 << j holds the
// weight of column 8 b + j times 2^j, and vpdpbusd multiplies the four bytes with the activations of those columns. 8
// sums, one for each j, are shifted right by j and added at the end.
#include "binary_int8_avx512.h"
#include "read_ahead.h"

namespace bitmill::detail {
namespace {

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

// Bit j of a word.
template <int j>
void add_bit(__m512i& sum, __m512i bits, const int32_t* q) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(1 << j));
  sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(bits, mask), _mm512_set1_epi32(q[j]));
  asm volatile("" : "+v"(sum));  // one bit after the other; otherwise g++ runs out of registers
}

void one_tile(const Int8Task& task, int64_t row, int64_t tile, const int32_t* q) {
  const int32_t* weight = task.tile(tile);
  float partial[kTileRows];
  for (int64_t group = 0; group < task.groups; ++group) {
    __m512i total = _mm512_setzero_si512();
    const int64_t end = task.group_end(group);
    for (int64_t w = group * task.group_words; w < end;) {
      const int64_t pause = w + kWordsBeforeOverflow < end ? w + kWordsBeforeOverflow : end;
      __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
      for (; w < pause; ++w) {
        const __m512i bits = _mm512_loadu_si512(weight + w * kTileRows);
        read_ahead(weight + w * kTileRows);
        if (begins_page(w)) read_page_ahead(weight + w * kTileRows);
        add_bit<0>(s0, bits, q + 8 * w);
        add_bit<1>(s1, bits, q + 8 * w);
        add_bit<2>(s2, bits, q + 8 * w);
        add_bit<3>(s3, bits, q + 8 * w);
        add_bit<4>(s4, bits, q + 8 * w);
        add_bit<5>(s5, bits, q + 8 * w);
        add_bit<6>(s6, bits, q + 8 * w);
        add_bit<7>(s7, bits, q + 8 * w);
      }
      const __m512i a = _mm512_add_epi32(s0, _mm512_srai_epi32(s1, 1));
      const __m512i b = _mm512_add_epi32(_mm512_srai_epi32(s2, 2), _mm512_srai_epi32(s3, 3));
      const __m512i c = _mm512_add_epi32(_mm512_srai_epi32(s4, 4), _mm512_srai_epi32(s5, 5));
      const __m512i d = _mm512_add_epi32(_mm512_srai_epi32(s6, 6), _mm512_srai_epi32(s7, 7));
      total = _mm512_add_epi32(total, _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d)));
    }
    finish(task, row, tile, group, total, partial);
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
    for (int64_t tile = begin; tile < end; ++tile) one_tile(task, row, tile, q);
  }
}

}  // namespace bitmill::detail
