// SPDX-License-Identifier: Apache-2.0
// What the AVX2 forms of the salient part share: the factors of a tile, entries from masks and lists, and the end of a
// sum.
#pragma once

#include "avx2.h"
#include "layout.h"
#include "salient_scatter.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

inline constexpr int64_t kListSteps = 64;  // steps of a list that are decoded, and added up, together

// What will be read 1 KiB further on in a stream.
static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + 1024, _MM_HINT_T0); }

// The outputs of a tile that exist.
static inline int64_t outputs_of_tile(const SalientWeight& w, int64_t tile) {
  const int64_t left = w.n - tile * kTileRows;
  return left < kTileRows ? left : kTileRows;
}

// A list or a bitmap of so few rows is multiplied row by row, as it is stored; more rows are transposed.
static inline bool few_rows(const SalientTask& task) {
  return task.m < (task.weight.encoding == SalientEncoding::bitmap ? 3 : 2);
}

struct Outputs {  // one number for each output of a tile
  __m256 low, high;
};

static inline Outputs load_outputs(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store_outputs(float* p, Outputs v) { _mm256_storeu_ps(p, v.low), _mm256_storeu_ps(p + 8, v.high); }

// The factors of a tile's 16 outputs; 0 past n.
struct TileFactors {
  alignas(32) float scale[kTileRows], zero[kTileRows];  // of the codes
  float* base;  // [groups][16]: what the sign plane gave a salient weight, mu - alpha
  float* mu;    // [groups][16], or null

  void load(const SalientTask& task, int64_t tile) {
    const SalientWeight& w = task.weight;
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      const int64_t output = tile * kTileRows + lane;
      const bool there = output < w.n;
      scale[lane] = there && w.value_scale ? w.value_scale[output] : 0.0f;
      zero[lane] = there && w.value_zero ? w.value_zero[output] : 0.0f;
      for (int64_t group = 0; group < task.groups; ++group) {
        const int64_t from = output * task.groups + group, to = group * kTileRows + lane;
        const float mean = there && w.mu ? w.mu[from] : 0.0f;
        base[to] = there ? mean - w.alpha[from] : 0.0f;
        if (mu) mu[to] = mean;
      }
    }
  }
};

// The first `count` of 16 numbers; the others are 0, and not read.
static inline Outputs load_some(const float* p, int64_t count) {
  if (count == kTileRows) return load_outputs(p);
  const __m256i last = _mm256_set1_epi32(static_cast<int>(count)), eight = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_cmpgt_epi32(last, eight);
  const __m256i high = _mm256_cmpgt_epi32(last, _mm256_add_epi32(eight, _mm256_set1_epi32(8)));
  return {_mm256_maskload_ps(p, low), _mm256_maskload_ps(p + 8, high)};
}

// One row and one tile: the sum of the salient part to the result. `totals`: X_g of the row.
static inline void finish(const SalientTask& task, int64_t row, int64_t tile, Outputs sum, const TileFactors& factors,
                          const float* totals) {
  for (int64_t group = 0; factors.mu && group < task.groups; ++group) {
    const Outputs mu = load_outputs(factors.mu + group * kTileRows);
    const __m256 total = _mm256_set1_ps(totals[group]);
    sum = {_mm256_fmadd_ps(mu.low, total, sum.low), _mm256_fmadd_ps(mu.high, total, sum.high)};
  }
  if (task.row_scale) {
    const __m256 scale = _mm256_set1_ps(task.row_scale[row]);
    sum = {_mm256_mul_ps(sum.low, scale), _mm256_mul_ps(sum.high, scale)};
  }
  store_outputs(task.at(row, tile), sum);
}

// The same for `count` <= 8 rows: rows_of(lane) are the sums of 8 rows for one output. `totals`: [count][groups].
template <class RowsOf>
static inline void finish_rows(const SalientTask& task, int64_t row, int64_t count, int64_t tile, const RowsOf& rows_of,
                               const TileFactors& factors, const float* totals) {
  alignas(32) float turned[8 * kTileRows];
  for (int half = 0; half < kTileRows; half += 8) {
    __m256 v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) v[i] = rows_of(half + i);
    transpose8(v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm256_store_ps(turned + i * kTileRows + half, v[i]);
  }
  for (int64_t r = 0; r < count; ++r) {
    finish(task, row + r, tile, load_outputs(turned + r * kTileRows), factors, totals + r * task.groups);
  }
}

// The mask of row 16 tile + lane, one word; bits past k are 0.
static inline uint32_t mask_word(const SalientWeight& w, int64_t tile, int64_t lane, int64_t word) {
  const uint32_t bits = static_cast<uint32_t>(w.mask[(tile * word_count(w.k) + word) * kTileRows + lane]);
  const int64_t columns = w.k - 32 * word;
  return columns >= 32 ? bits : bits & ((1u << columns) - 1);
}

// The places of the bits of a byte, ascending, and where each bit's value lies among them (0x80: there is none).
struct Places {
  alignas(64) uint8_t of_bits[256][8], rank[256][8];
};
constexpr Places make_places() {
  Places places{};
  for (int byte = 0; byte < 256; ++byte) {
    uint8_t count = 0;
    for (uint8_t bit = 0; bit < 8; ++bit) {
      const bool set = byte >> bit & 1;
      places.rank[byte][bit] = set ? count : uint8_t{0x80};
      if (set) places.of_bits[byte][count++] = bit;
    }
  }
  return places;
}
inline constexpr Places kPlaces = make_places();

// The columns of the mask bits of words [begin, end), ascending, counted from column `origin`, to `column`, which has
// room for 8 more than there can be. Returns how many. A table has no branch that a random mask would mislead.
static inline int64_t columns_of_words(const SalientWeight& w, int64_t tile, int64_t lane, int64_t begin, int64_t end,
                                       int64_t origin, uint16_t* column) {
  uint16_t* next = column;
  __m128i first = _mm_set1_epi16(static_cast<int16_t>(32 * begin - origin));
  for (int64_t word = begin; word < end; ++word) {
    const uint32_t bits = mask_word(w, tile, lane, word);
    const auto put = [&](int byte, uint32_t before) {
      const auto* places = reinterpret_cast<const __m128i*>(kPlaces.of_bits[bits >> (8 * byte) & 255]);
      const __m128i columns = _mm_add_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(places)), first);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(next + _mm_popcnt_u32(before)), columns);
      first = _mm_add_epi16(first, _mm_set1_epi16(8));
    };
    put(0, 0), put(1, bits & 0xFF), put(2, bits & 0xFFFF), put(3, bits & 0xFFFFFF);
    next += _mm_popcnt_u32(bits);
  }
  return next - column;
}

// 8 bytes of codes as floats.
static inline __m256 codes_to_floats(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)); }

// A step of a list: the columns of 16 rows move on.
struct ListColumns {
  __m256i column = _mm256_set1_epi16(-1);
  __m256i none;  // the rows without an entry

  void move(const uint8_t* gap) {
    const __m128i gaps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(gap));
    none = _mm256_cvtepi8_epi16(_mm_cmpeq_epi8(gaps, _mm_set1_epi8(static_cast<char>(kNoEntry))));
    const __m256i moved = _mm256_add_epi16(_mm256_cvtepu8_epi16(gaps), _mm256_set1_epi16(1));
    column = _mm256_add_epi16(column, _mm256_add_epi16(moved, none));
  }

  // At most k - 1, whatever the gaps are; k where there is no entry.
  __m256i columns(int64_t k) const {
    const __m256i last = _mm256_set1_epi16(static_cast<int16_t>(k - 1));
    return _mm256_blendv_epi8(_mm256_min_epu16(column, last), _mm256_set1_epi16(static_cast<int16_t>(k)), none);
  }
};

// x[column] for 8 columns. Single loads and inserts: the gather instruction is a sixth slower on Zen 3.
static inline __m256 fetch8(const float* x, const uint16_t* column) {
  const auto four = [x](const uint16_t* c) {
    __m128 v = _mm_load_ss(x + c[0]);
    insert<1>(v, x + c[1]);
    insert<2>(v, x + c[2]);
    insert<3>(v, x + c[3]);
    return v;
  };
  return _mm256_set_m128(four(column + 4), four(column));
}

}  // namespace
}  // namespace bitmill::detail
