// SPDX-License-Identifier: Apache-2.0
// The salient part of a list or a bitmap with int8 activations for many rows, which are 16 bits wide when transposed: 2
// salient weights are one vpmaddwd for 8 of them.
#include "salient_int8_avx2.h"
#include "salient_many_rows_avx2.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kExactEntries = 256;  // 256 x 127 fit in 16 bits

__m256i nothing() { return _mm256_setzero_si256(); }

// Sums of 16 rows: of code x q, for the rows that unpacking puts into each half, and of q in 16 bits.
struct Sixteen {
  __m256i low = nothing(), high = nothing(), plain = nothing();

  void add(__m256i a, __m256i b, __m256i codes) {
    // The barriers keep each sum in its register; otherwise g++ moves all of them once more in every step.
    low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), codes));
    settle(low);
    high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), codes));
    settle(high);
    plain = _mm256_add_epi16(plain, _mm256_add_epi16(a, b));
    settle(plain);
  }

  void add_to(int32_t* code_sums, int32_t* plain_sums) const {
    const auto put = [](int32_t* to, __m256i v) { store_bits(to, _mm256_add_epi32(load_bits(to), v)); };
    put(code_sums, _mm256_permute2x128_si256(low, high, 0x20));
    put(code_sums + 8, _mm256_permute2x128_si256(low, high, 0x31));
    put(plain_sums, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(plain)));
    put(plain_sums + 8, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(plain, 1)));
  }
};

struct Integers {
  using Input = int8_t;
  using Element = int16_t;
  using Sum = int32_t;
  using Entries = Chunk<uint16_t>;  // codes; in a list the two of a pair lie side by side
  static constexpr int kVector = 16;
  static constexpr int64_t kPlain = kTileRows * kBlockRows;  // code sums [16][32], then plain ones
  static constexpr int64_t kSums = 2 * kPlain;

  // Adds entries to the sums of one output. Pairs of entries lie 2 x stride apart, and if that is more than 2 there is
  // no single one. x: [column][width].
  template <int width, int stride>
  static void add_entries(const uint16_t* column, const uint16_t* value, int64_t count, const int16_t* x,
                          int32_t* sums) {
    while (count > 0) {
      const int64_t part = count < kExactEntries ? count : kExactEntries;
      Sixteen s0, s1;
      for (int64_t i = 0; i + 2 <= part; i += 2, column += 2 * stride, value += 2 * stride) {
        const int16_t *a = x + int64_t{column[0]} * width, *b = x + int64_t{column[1]} * width;
        int32_t pair;
        __builtin_memcpy(&pair, value, sizeof(pair));
        const __m256i codes = _mm256_set1_epi32(pair);
        s0.add(load_bits(a), load_bits(b), codes);
        if constexpr (width > 16) s1.add(load_bits(a + 16), load_bits(b + 16), codes);
      }
      // The last one of an odd number, and nothing of an even one: a branch would be wrong every other time.
      const int64_t odd = part % 2, back = 1 - odd;
      const __m256i mask = _mm256_set1_epi16(static_cast<int16_t>(-odd));
      const __m256i codes = _mm256_set1_epi32(value[-back]);
      const int16_t* a = x + int64_t{column[-back]} * width;
      s0.add(_mm256_and_si256(load_bits(a), mask), nothing(), codes);
      if constexpr (width > 16) s1.add(_mm256_and_si256(load_bits(a + 16), mask), nothing(), codes);
      s0.add_to(sums, sums + kPlain);
      if constexpr (width > 16) s1.add_to(sums + 16, sums + kPlain + 16);
      count -= part;
    }
  }

  // Two steps of a list at a time; one that is missing has no entries.
  static void decode_list(const SalientTask& task, Walk& walk, Entries& chunk) {
    const SalientWeight& w = task.weight;
    int64_t steps = 0;
    for (; steps < kListSteps && walk.step < walk.end; steps += 2) {
      __m256i column[2], code[2];
      for (int i = 0; i < 2; ++i) {
        column[i] = _mm256_set1_epi16(static_cast<int16_t>(w.k)), code[i] = nothing();
        if (walk.step == walk.end) continue;
        const int64_t at = walk.step++ * kTileRows;
        const auto* value = static_cast<const uint8_t*>(w.value) + at;
        prefetch(w.gap + at);
        prefetch(value);
        walk.list.move(w.gap + at);
        column[i] = walk.list.columns(w.k);
        code[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(value)));
      }
      const auto put = [steps](const __m256i* pair, uint16_t* to) {
        const __m256i low = _mm256_unpacklo_epi16(pair[0], pair[1]), high = _mm256_unpackhi_epi16(pair[0], pair[1]);
        store_bits(to + steps * kTileRows, _mm256_permute2x128_si256(low, high, 0x20));
        store_bits(to + steps * kTileRows + 16, _mm256_permute2x128_si256(low, high, 0x31));
      };
      put(column, chunk.column);
      put(code, chunk.value);
    }
    for (int64_t lane = 0; lane < kTileRows; ++lane) chunk.first[lane] = 2 * lane, chunk.count[lane] = steps;
  }

  static void decode_bitmap(const SalientTask& task, int64_t tile, int64_t begin, int64_t end, Walk& walk,
                            Entries& chunk) {
    const SalientWeight& w = task.weight;
    int64_t size = 0;
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      chunk.first[lane] = size;
      if (lane < outputs_of_tile(w, tile)) {
        int64_t& entry = walk.entry[lane];
        int64_t count = columns_of_words(w, tile, lane, begin, end, 32 * begin, chunk.column + size);
        const int64_t rest = w.start[tile * kTileRows + lane + 1] - entry;
        if (count > rest) count = rest;  // contradictory arrays
        for (int64_t i = 0; i < count; i += 16) {
          const int64_t left = w.entries - (entry + i);
          const uint8_t* from = static_cast<const uint8_t*>(w.value) + entry + i;
          uint8_t last[16] = {};
          if (left < 16) {
            __builtin_memcpy(last, from, static_cast<size_t>(left));
            from = last;
          }
          const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
          store_bits(chunk.value + size + i, _mm256_cvtepu8_epi16(codes));
        }
        entry += count, size += count;
      }
      chunk.count[lane] = size - chunk.first[lane];
    }
  }

  // `count` rows of `width` bytes to [width][stride] of 16 bits; rows that are missing are 0.
  static void transpose(const int8_t* q, int64_t width, int64_t count, int64_t stride, int16_t* out) {
    for (int64_t row = 0; row < stride; row += 8) {
      for (int64_t column = 0; column < width; column += 8) {
        const int64_t columns = width - column < 8 ? width - column : 8;
        __m128i v[8], t[8];
        for (int i = 0; i < 8; ++i) {
          int64_t bytes = 0;
          if (row + i < count) {
            const int8_t* from = q + (row + i) * width + column;
            if (columns == 8) {
              __builtin_memcpy(&bytes, from, 8);
            } else {
              __builtin_memcpy(&bytes, from, static_cast<size_t>(columns));
            }
          }
          v[i] = _mm_cvtepi8_epi16(_mm_cvtsi64_si128(bytes));
        }
#pragma GCC unroll 3
        for (int round = 0; round < 3; ++round) {  // a perfect shuffle of 8 rows of 8, 3 times: a transposition
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            t[2 * i] = _mm_unpacklo_epi16(v[i], v[i + 4]);
            t[2 * i + 1] = _mm_unpackhi_epi16(v[i], v[i + 4]);
          }
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) v[i] = t[i];
        }
        for (int64_t i = 0; i < columns; ++i) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (column + i) * stride + row), v[i]);
        }
      }
    }
  }

  static __m256 eight_rows(const int32_t* sums, int64_t lane, const TileFactors& factors) {
    const int32_t* from = sums + lane * kBlockRows;
    return to_sum(load_bits(from), load_bits(from + kPlain), _mm256_set1_ps(factors.scale[lane]),
                  _mm256_set1_ps(factors.zero[lane]), _mm256_set1_ps(factors.base[lane]));
  }
};

}  // namespace

void salient_int8_many_rows_avx2(const SalientTask& task, const float* totals, int64_t begin, int64_t end) {
  multiply_transposed<Integers>(task, task.q, totals, begin, end);
}

}  // namespace bitmill::detail
