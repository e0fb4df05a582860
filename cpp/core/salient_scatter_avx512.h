// SPDX-License-Identifier: Apache-2.0
// What the AVX-512 forms of the salient part share: the factors of a tile, columns from masks, and the end of a sum.
#pragma once

#include "avx512.h"
#include "layout.h"
#include "salient_scatter.h"
#include "scratch.h"

namespace bitmill::detail {

inline constexpr int64_t kSegmentWords = 30;  // words of a mask that are decoded together
inline constexpr int64_t kSegmentColumns = 32 * kSegmentWords;

// What will be read 1 KiB further on in a stream.
static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + 1024, _MM_HINT_T0); }

// A register of zeros that the compiler does not look through: what an expansion or a compression with zeroing goes to.
// Zen 4 lets these wait for the old content of their target, which a loop would turn into a chain.
static inline __m512i fresh_zeros() {
  __m512i zeros = _mm512_setzero_si512();
  asm volatile("" : "+v"(zeros));
  return zeros;
}

static inline __mmask16 lanes_of_tile(const SalientWeight& w, int64_t tile) {
  return first_lanes(w.n - tile * kTileRows);
}

// Group `group` of [n, groups] for the 16 rows of a tile; 0 past n.
static inline __m512 load_factor(const SalientTask& task, const float* factor, int64_t tile, int64_t group) {
  return load_scale(factor, task.groups, tile * kTileRows, group, lanes_of_tile(task.weight, tile));
}

// The factors of a tile's 16 rows.
struct TileFactors {
  __m512 scale, zero;  // of the codes
  float* base;         // [groups][16]: what the sign plane gave a salient weight, mu - alpha
  float* mu;           // [groups][16], or null

  void load(const SalientTask& task, int64_t tile) {
    const SalientWeight& w = task.weight;
    const __mmask16 lanes = lanes_of_tile(w, tile);
    if (w.value_scale) {
      scale = _mm512_maskz_loadu_ps(lanes, w.value_scale + tile * kTileRows);
      zero = _mm512_maskz_loadu_ps(lanes, w.value_zero + tile * kTileRows);
    }
    for (int64_t group = 0; group < task.groups; ++group) {
      const __m512 alpha = load_factor(task, w.alpha, tile, group);
      const __m512 mean = w.mu ? load_factor(task, w.mu, tile, group) : _mm512_setzero_ps();
      _mm512_storeu_ps(base + group * kTileRows, _mm512_sub_ps(mean, alpha));
      if (mu) _mm512_storeu_ps(mu + group * kTileRows, mean);
    }
  }
};

// One row and one tile: sum of the salient part to the result. `totals`: X_g of the row.
static inline void finish(const SalientTask& task, int64_t row, int64_t tile, __m512 sum, const TileFactors& factors,
                          const float* totals) {
  for (int64_t group = 0; factors.mu && group < task.groups; ++group) {
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(factors.mu + group * kTileRows), _mm512_set1_ps(totals[group]), sum);
  }
  if (task.row_scale) sum = _mm512_mul_ps(sum, _mm512_set1_ps(task.row_scale[row]));
  _mm512_storeu_ps(task.at(row, tile), sum);
}

// The same for `count` <= 16 rows whose sums lie output by output, `stride` apart. `totals`: [count][groups].
static inline void finish_rows(const SalientTask& task, int64_t row, int64_t count, int64_t tile, const float* sums,
                               int64_t stride, const TileFactors& factors, const float* totals) {
  alignas(64) float turned[16 * kTileRows];
  transpose16(sums, stride, turned, kTileRows);
  for (int64_t r = 0; r < count; ++r) {
    finish(task, row + r, tile, _mm512_load_ps(turned + r * kTileRows), factors, totals + r * task.groups);
  }
}

// How many blocks of rows, each of `bytes`, are multiplied together, so that a salient weight is decoded once for all:
// as many as the second-level cache holds beside the weights.
static inline int64_t blocks_together(int64_t bytes) {
  constexpr int64_t kCache = 1 << 19;
  return bytes < kCache ? kCache / bytes : 1;
}

// The columns of the mask bits of words [begin, end) of row 16 tile + lane, ascending, to `column`, which has room for
// 64 more than there can be. Bits past k do not count. Returns how many.
static inline int64_t columns_of_words(const SalientWeight& w, int64_t tile, int64_t lane, int64_t begin, int64_t end,
                                       int32_t* column) {
  const __m512i bytes =  // 0, 1, 2, ... 63
      _mm512_setr_epi64(0x0706050403020100, 0x0F0E0D0C0B0A0908, 0x1716151413121110, 0x1F1E1D1C1B1A1918,
                        0x2726252423222120, 0x2F2E2D2C2B2A2928, 0x3736353433323130, 0x3F3E3D3C3B3A3938);
  const int32_t* mask = w.mask + tile * word_count(w.k) * kTileRows + lane;
  int32_t* next = column;
  const auto add = [&](uint64_t bits, int64_t word) {
    const __m512i found = _mm512_mask_compress_epi8(fresh_zeros(), bits, bytes);
    const __m512i first = _mm512_set1_epi32(static_cast<int>(32 * word));
    const auto put = [&](int64_t at, __m128i offsets) {
      _mm512_storeu_si512(next + at, _mm512_add_epi32(_mm512_cvtepu8_epi32(offsets), first));
    };
    const int64_t ones = __builtin_popcountll(bits);
    put(0, _mm512_castsi512_si128(found));
    if (ones > 16) {
      put(16, _mm512_extracti32x4_epi32(found, 1));
      put(32, _mm512_extracti32x4_epi32(found, 2));
      put(48, _mm512_extracti32x4_epi32(found, 3));
    }
    next += ones;
  };
  const auto bits_of = [mask](int64_t word) { return static_cast<uint32_t>(mask[word * kTileRows]); };
  int64_t word = begin;
  for (; word + 2 <= end && 32 * (word + 2) <= w.k; word += 2)
    add(uint64_t{bits_of(word + 1)} << 32 | bits_of(word), word);
  for (; word < end; ++word) {
    const int64_t left = w.k - 32 * word;
    add(left >= 32 ? bits_of(word) : bits_of(word) & ((1u << left) - 1), word);
  }
  return next - column;
}

// 16 gaps of a step: the columns of the 16 rows move on.
static inline __m256i next_columns(__m256i column, __m128i gap, __mmask16 entries) {
  const __m256i moved = _mm256_add_epi16(column, _mm256_cvtepu8_epi16(gap));
  return _mm256_mask_add_epi16(moved, entries, moved, _mm256_set1_epi16(1));
}

// Lane 1, 2 or 3 of v from memory, in one instruction: the compiler takes two.
template <int lane>
static inline void insert(__m128& v, const float* p) {
  __asm__("vinsertps %2, %1, %0, %0" : "+v"(v) : "m"(*p), "i"(lane << 4));
}

// 4 columns of 16 bits each, as numbers.
struct FourColumns {
  uint64_t first, second, third, fourth;

  explicit FourColumns(int64_t columns) {
    const uint64_t c = static_cast<uint64_t>(columns);
    first = c & 0xFFFF, second = _bextr_u64(c, 16, 16), third = _bextr_u64(c, 32, 16), fourth = c >> 48;
  }
};

// x[column] for 16 columns. Single loads and inserts: the gather instruction takes twice the time on Zen 4.
static inline __m512 fetch16(const float* x, __m256i column) {
  const __m128i low = _mm256_castsi256_si128(column), high = _mm256_extracti128_si256(column, 1);
  const auto four = [x](int64_t columns) {
    const FourColumns c(columns);
    __m128 v = _mm_load_ss(x + c.first);
    insert<1>(v, x + c.second);
    insert<2>(v, x + c.third);
    insert<3>(v, x + c.fourth);
    return v;
  };
  const __m256 lower = _mm256_set_m128(four(_mm_extract_epi64(low, 1)), four(_mm_cvtsi128_si64(low)));
  const __m256 upper = _mm256_set_m128(four(_mm_extract_epi64(high, 1)), four(_mm_cvtsi128_si64(high)));
  return _mm512_insertf32x8(_mm512_castps256_ps512(lower), upper, 1);
}

}  // namespace bitmill::detail
