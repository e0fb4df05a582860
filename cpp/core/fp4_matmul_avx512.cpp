// SPDX-License-Identifier: Apache-2.0
// Float activations times FP4 weights in float32: vpermps decodes a code of 16 outputs from the table of 16 values (it
// ignores the upper bits of its index), fused multiply-adds do the rest.
#include "fp4_tiles_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int kSingleTiles = kChunkTiles;

template <class T>
struct FloatPath : FloatSums<T> {
  using Values = __m512;
  static constexpr int kSteps = 8;
  __m512 table;

  static int64_t fours(int64_t rows) { return rows / 4 * 4; }

  static __m512 elements(const T* x, int64_t k, int64_t first) { return load16(x + first, first_lanes(k - first)); }

  __m512 lookup(__m512i codes) const { return _mm512_permutexvar_ps(codes, table); }
  template <int rows>
  static __m512i next(__m512i codes) {
    return _mm512_srli_epi32(codes, 4);
  }
  static __m512 multiply_add(__m512 sum, __m512 a, __m512 w) { return _mm512_fmadd_ps(a, w, sum); }

  // The two columns of a byte of 16 outputs.
  __m512 add_byte(__m512 sum, __m512i first, __m512i second, __m512 low, __m512 high) const {
    sum = _mm512_fmadd_ps(low, this->lookup(first), sum);
    sum = _mm512_fmadd_ps(high, this->lookup(second), sum);
    asm volatile("" : "+v"(sum));  // one tile after the other; otherwise g++ runs out of registers
    return sum;
  }

  // One word of 8 tiles. A byte's codes come from a load that begins at that byte, which spares a shift; the second of
  // them from a high product, which leaves the units of lookups and shifts to the lookups. These loads reach 3 bytes
  // past the word, so the last word of a tile is shifted.
  template <bool last>
  void add_word(const int32_t* const (&codes)[kSingleTiles], int64_t w, const float* x,
                __m512 (&sum)[kSingleTiles]) const {
    const __m512i sixteenth = _mm512_set1_epi16(1 << 12);
#pragma GCC unroll 1
    for (int byte = 0; byte < 4; ++byte) {
      __m512 low = _mm512_set1_ps(x[8 * w + 2 * byte]), high = _mm512_set1_ps(x[8 * w + 2 * byte + 1]);
      asm volatile("" : "+v"(low), "+v"(high));  // in registers; g++ would keep one on the stack
#pragma GCC unroll 8
      for (int t = 0; t < kSingleTiles; ++t) {
        const char* word = reinterpret_cast<const char*>(codes[t] + w * kTileRows);
        const __m512i bits = last ? _mm512_srl_epi32(_mm512_loadu_si512(word), _mm_cvtsi32_si128(8 * byte))
                                  : _mm512_loadu_si512(word + byte);
        sum[t] = add_byte(sum[t], bits, _mm512_mulhi_epu16(bits, sixteenth), low, high);
      }
    }
  }

  void single(const Fp4Task& task, int64_t row, int64_t tile, const float* x) const {
    const int32_t* codes[kSingleTiles];
    for (int t = 0; t < kSingleTiles; ++t) codes[t] = task.codes(tile + t);
    alignas(64) float result[kSingleTiles][kTileRows] = {};
    for (int64_t group = 0; group < task.groups; ++group) {
      __m512 sum[kSingleTiles];
#pragma GCC unroll 8
      for (int t = 0; t < kSingleTiles; ++t) sum[t] = _mm512_setzero_ps();
      const int64_t group_end = task.group_end(group), end = group_end < task.words ? group_end : group_end - 1;
      for (int64_t w = group * task.group_words; w < end; ++w) {
        const int64_t ahead = prefetched_word(task, w, kSingleTiles);
#pragma GCC unroll 8
        for (int t = 0; t < kSingleTiles; ++t) {
          _mm_prefetch(reinterpret_cast<const char*>(codes[t] + ahead * kTileRows), _MM_HINT_T1);
        }
        add_word<false>(codes, w, x, sum);
      }
      if (end < group_end) add_word<true>(codes, end, x, sum);
#pragma GCC unroll 8
      for (int t = 0; t < kSingleTiles; ++t) {
        const __m512 scale = _mm512_loadu_ps(task.scales(tile + t) + group * kTileRows);
        _mm512_store_ps(result[t], this->fold(_mm512_load_ps(result[t]), scale, sum[t], row, group));
      }
    }
    finish_rows(task, *this, row, 1, tile, kSingleTiles, result[0]);
  }
};

}  // namespace

void fp4_matmul_tiles_avx512(const Fp4MatmulParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    const FloatPath<T> path{{}, _mm512_loadu_ps(p.weight.table)};
    multiply_tiles(p, path, begin, end);
  });
}

}  // namespace bitmill::detail
