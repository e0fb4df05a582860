// SPDX-License-Identifier: Apache-2.0
// int8 activations times bits by table lookup. The words of two tiles become vectors of 16-bit lanes: 16 columns of 32
// outputs. A lane's bits are three numbers of 6, 5 and 5 bits, and vpermi2w and vpermw fetch for each the sum of those
// activations whose bit is set, from tables of 64, 32 and 32 sums. 8 rows share the prepared bits of 2 pairs of tiles.
// The tables of a span of columns fit the first-level cache; all tiles are multiplied with them before the next span.
#include "binary_int8_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kSpanWords = 6;    // 12 x 16 x 127 < 2^15, and tables of 24 KiB
constexpr int64_t kVector = 32;      // entries of tables in a vector
constexpr int64_t kHalfVectors = 4;  // vectors of tables of 16 columns: 2 for the first 6 columns, 1 for 5, 1 for 5
constexpr int kRows = 8;             // of activations, that are multiplied together
constexpr int64_t kFewRows = 16;     // so few that words are fetched ahead
constexpr int kPairTiles = 2;        // tiles whose outputs share a vector
constexpr int kBlockTiles = 2 * kPairTiles;

struct Span {
  int64_t group, first, words;
};

// The tables of a span for 8 rows, [half word][kHalfVectors][8][32]: vector v of 8 rows lies side by side.
class Tables {
 public:
  Tables() {
    alignas(64) int8_t low[64], high[64];
    for (int entry = 0; entry < kVector; ++entry) {
      for (int bit = 0; bit < 2; ++bit) {
        low[2 * entry + bit] = static_cast<int8_t>((entry >> bit) & 1);
        high[2 * entry + bit] = static_cast<int8_t>((entry >> (bit + 2)) & 1);
      }
    }
    low_ = _mm512_load_si512(low), high_ = _mm512_load_si512(high);
  }

  // q: [count, k]. Columns past k count as zeros; what the tables of missing rows hold does not matter.
  void build(const int8_t* q, int64_t count, int64_t k, const Span& span) {
    const int64_t begin = 32 * span.first, end = begin + 32 * span.words < k ? begin + 32 * span.words : k;
    for (int64_t row = 0; row < count; ++row) {
      alignas(64) int8_t columns[32 * kSpanWords] = {};
      alignas(64) int16_t wide[32 * kSpanWords];  // the same, to be broadcast from memory
      __builtin_memcpy(columns, q + row * k + begin, static_cast<size_t>(end - begin));
      for (int64_t i = 0; i < 32 * span.words; i += 32) {
        const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(columns + i));
        _mm512_store_si512(wide + i, _mm512_cvtepi8_epi16(bytes));
      }
      int16_t* out = entries_ + row * kVector;
      for (int64_t column = 0; column < 32 * span.words; column += 16, out += kHalfVectors * kRows * kVector) {
        const int8_t* x = columns + column;
        const int16_t* y = wide + column;
        const __m512i first = sums_of(x, y);
        _mm512_store_si512(out, first);
        _mm512_store_si512(out + kRows * kVector, _mm512_add_epi16(first, broadcast(y + 5)));
        _mm512_store_si512(out + 2 * kRows * kVector, sums_of(x + 6, y + 6));
        _mm512_store_si512(out + 3 * kRows * kVector, sums_of(x + 11, y + 11));
      }
    }
  }

  const int16_t* entries() const { return entries_; }

 private:
  // Two bytes to all lanes from memory: the compiler would take two pairs through a general register.
  static __m512i broadcast(const void* pair) {
#ifdef BITMILL_EMULATED_AVX512
    int16_t value;
    __builtin_memcpy(&value, pair, sizeof(value));
    return _mm512_set1_epi16(value);
#else
    __m512i lanes;
    asm("vpbroadcastw %1, %0" : "=v"(lanes) : "m"(*static_cast<const int16_t*>(pair)));
    return lanes;
#endif
  }

  // Entry i: the sum of those of 5 columns whose bit in i is set. y: x as int16.
  __m512i sums_of(const int8_t* x, const int16_t* y) const {
    const __m512i two = _mm512_maddubs_epi16(low_, broadcast(x));
    const __m512i four = _mm512_add_epi16(two, _mm512_maddubs_epi16(high_, broadcast(x + 2)));
    return _mm512_mask_add_epi16(four, 0xFFFF0000u, four, broadcast(y + 4));
  }

  __m512i low_, high_;  // bits 0, 1 and bits 2, 3 of the numbers of entries, one a byte
  alignas(64) int16_t entries_[2 * kSpanWords * kHalfVectors * kRows * kVector];
};

struct Pair {  // of vectors, for two pairs of tiles; named, not an array: g++ keeps indexed ones in memory
  __m512i s0, s1;
};

// Adds the sums that the lowest 6 bits of `index` select from two vectors.
template <int pairs>
void look_up6(Pair& sum, const int16_t* table, const Pair& index) {
  __m512i low = _mm512_load_si512(table), high = _mm512_load_si512(table + kRows * kVector);
  asm volatile("" : "+v"(low), "+v"(high));  // loaded once, not by both lookups
  sum.s0 = _mm512_add_epi16(sum.s0, _mm512_permutex2var_epi16(low, index.s0, high));
  if constexpr (pairs == 2) sum.s1 = _mm512_add_epi16(sum.s1, _mm512_permutex2var_epi16(low, index.s1, high));
  asm volatile("" : "+v"(sum.s0), "+v"(sum.s1));  // keeps lookup and sum together; otherwise registers run out
}

// The lowest 5 bits, one vector.
template <int pairs>
void look_up5(Pair& sum, const int16_t* table, const Pair& index) {
  __m512i entries = _mm512_load_si512(table);
  asm volatile("" : "+v"(entries));
  sum.s0 = _mm512_add_epi16(sum.s0, _mm512_permutexvar_epi16(index.s0, entries));
  if constexpr (pairs == 2) sum.s1 = _mm512_add_epi16(sum.s1, _mm512_permutexvar_epi16(index.s1, entries));
  asm volatile("" : "+v"(sum.s0), "+v"(sum.s1));
}

// The low or high 16 columns of two tiles: their outputs take turns.
__m512i half_of(const int32_t* tile0, const int32_t* tile1, bool high) {
  const __m512i a = _mm512_loadu_si512(tile0), b = _mm512_loadu_si512(tile1);
  return high ? _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(a, 16), b)
              : _mm512_mask_blend_epi16(0xAAAAAAAAu, a, _mm512_slli_epi32(b, 16));
}

// What a block of tiles keeps of a row from span to span.
struct alignas(64) Kept {
  int32_t plus[kBlockTiles][kTileRows];   // of the group
  float partial[kBlockTiles][kTileRows];  // of the groups before

  // 16-bit sums of a span.
  template <int pairs>
  void add(const Pair& sum, bool begins) {
    add(plus, sum.s0, begins);
    if constexpr (pairs == 2) add(plus + kPairTiles, sum.s1, begins);
  }

 private:
  static void add(int32_t (*tiles)[kTileRows], __m512i sum, bool begins) {
    for (int t = 0; t < kPairTiles; ++t) {
      const __m512i of_tile = _mm512_madd_epi16(sum, _mm512_set1_epi32(t == 0 ? 1 : 1 << 16));
      const __m512i before = begins ? _mm512_setzero_si512() : _mm512_load_si512(tiles[t]);
      _mm512_store_si512(tiles[t], _mm512_add_epi32(before, of_tile));
    }
  }
};

// Tiles of `count` rows, whole, as float32 and with one group.
[[gnu::noinline]] void finish_whole(const Int8Task& task, int64_t row, int64_t count, int64_t tile, int tiles,
                                    const Kept* kept) {
  const BinaryInt8MatmulParams& p = task.p;
  alignas(64) static constexpr float kNone[kTileRows] = {-0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f,
                                                         -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f};
  for (int t = 0; t < tiles; ++t) {  // x + -0 is x, for every x
    const int64_t column = (tile + t) * kTileRows, next = p.addend ? kTileRows : 0;
    const float* addend = p.addend ? p.addend.at(row, tile + t) : kNone;
    const __m512 scale = _mm512_loadu_ps(p.scale + column), bias = _mm512_loadu_ps(p.bias ? p.bias + column : kNone);
    float* out = static_cast<float*>(p.out) + row * p.n + column;
    for (int64_t r = 0; r < count; ++r, out += p.n, addend += next) {
      const __m512 dot = to_dot(task, row + r, 0, _mm512_load_si512(kept[r].plus[t]));
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(p.row_scale[row + r]));
      const __m512 sum = _mm512_add_ps(_mm512_mul_ps(factor, dot), _mm512_loadu_ps(addend));
      _mm512_storeu_ps(out, _mm512_add_ps(sum, bias));
    }
  }
}

// Adds a span to a block of tiles; at the end of a group its results follow.
template <int rows, int pairs>
[[gnu::noinline]] void block(const Int8Task& task, int64_t row, int64_t count, int64_t tile, const Span& span,
                             const int16_t* table, Kept* kept) {
  static_assert((rows == 8 || rows == 4) && (pairs == 1 || pairs == 2));
  constexpr int tiles = pairs * kPairTiles;
  const bool begins = span.first == span.group * task.group_words;
  const bool ends = span.first + span.words == task.group_end(span.group);
  const bool whole = task.groups == 1 && task.p.out_dtype == Dtype::f32 && tile + tiles <= task.end &&
                     (tile + tiles) * kTileRows <= task.p.n;
  if (ends && whole) {  // the lines that this block is going to write arrive while it is computed
    const float* out = static_cast<const float*>(task.p.out) + row * task.p.n + tile * kTileRows;
    for (int64_t r = 0; r < count; ++r, out += task.p.n) {
      for (int t = 0; t < tiles; ++t) __builtin_prefetch(out + t * kTileRows, 1);
    }
  }
  const int64_t first = span.first * kTileRows;
  const int32_t *w0 = task.tile(tile) + first, *w1 = task.tile(tile + 1) + first;
  const int32_t *w2 = task.tile(tile + 2) + first, *w3 = task.tile(tile + 3) + first;
  const __m512i zero = _mm512_setzero_si512();
  Pair r0{zero, zero}, r1 = r0, r2 = r0, r3 = r0, r4 = r0, r5 = r0, r6 = r0, r7 = r0;
  for (int64_t half = 0; half < 2 * span.words; ++half) {
    const int64_t at = half / 2 * kTileRows;
    Pair index{half_of(w0 + at, w1 + at, half % 2 != 0), zero};
    if constexpr (pairs == 2) index.s1 = half_of(w2 + at, w3 + at, half % 2 != 0);
    look_up6<pairs>(r0, table, index);
    look_up6<pairs>(r1, table + kVector, index);
    look_up6<pairs>(r2, table + 2 * kVector, index);
    look_up6<pairs>(r3, table + 3 * kVector, index);
    if constexpr (rows == 8) {
      look_up6<pairs>(r4, table + 4 * kVector, index);
      look_up6<pairs>(r5, table + 5 * kVector, index);
      look_up6<pairs>(r6, table + 6 * kVector, index);
      look_up6<pairs>(r7, table + 7 * kVector, index);
    }
    table += 2 * kRows * kVector;
    for (int field = 0; field < 2; ++field, table += kRows * kVector) {
      // Shifts right by 6, then 5, as high products, which leave the units of the lookups to the lookups.
      const __m512i shift = _mm512_set1_epi16(field == 0 ? 1 << 10 : 1 << 11);
      index = {_mm512_mulhi_epu16(index.s0, shift), _mm512_mulhi_epu16(index.s1, shift)};
      look_up5<pairs>(r0, table, index);
      look_up5<pairs>(r1, table + kVector, index);
      look_up5<pairs>(r2, table + 2 * kVector, index);
      look_up5<pairs>(r3, table + 3 * kVector, index);
      if constexpr (rows == 8) {
        look_up5<pairs>(r4, table + 4 * kVector, index);
        look_up5<pairs>(r5, table + 5 * kVector, index);
        look_up5<pairs>(r6, table + 6 * kVector, index);
        look_up5<pairs>(r7, table + 7 * kVector, index);
      }
    }
  }
  kept[0].add<pairs>(r0, begins), kept[1].add<pairs>(r1, begins);
  kept[2].add<pairs>(r2, begins), kept[3].add<pairs>(r3, begins);
  if constexpr (rows == 8) {
    kept[4].add<pairs>(r4, begins), kept[5].add<pairs>(r5, begins);
    kept[6].add<pairs>(r6, begins), kept[7].add<pairs>(r7, begins);
  }
  if (!ends) return;
  if (whole) return finish_whole(task, row, count, tile, tiles, kept);
  for (int r = 0; r < count; ++r) {
    for (int t = 0; t < tiles; ++t) {
      finish(task, row + r, tile + t, span.group, _mm512_load_si512(kept[r].plus[t]), kept[r].partial[t]);
    }
  }
}

void multiply_span(const Int8Task& task, int64_t row, int64_t count, int64_t begin, const Span& span,
                   const int16_t* table, Kept* kept) {
  for (int64_t tile = begin; tile < task.end; tile += kBlockTiles, kept += kRows) {
    const bool both = tile + kPairTiles < task.end;
    if (task.p.m <= kFewRows) {  // the weight may come from memory, and the words of the next block are far from these
      for (int t = kBlockTiles; t < 2 * kBlockTiles; ++t) {
        const int32_t* next = task.tile(tile + t) + span.first * kTileRows;
        for (int64_t w = 0; w < span.words; ++w) __builtin_prefetch(next + w * kTileRows);
      }
    }
    auto* multiply = count > 4 ? (both ? block<8, 2> : block<8, 1>) : (both ? block<4, 2> : block<4, 1>);
    multiply(task, row, count, tile, span, table, kept);
  }
}

}  // namespace

void binary_int8_matmul_tiles_avx512(const BinaryInt8MatmulParams& p, int64_t begin, int64_t end) {
  const int64_t groups = p.group_size > 0 ? ceil_div(p.k, p.group_size) : 1;
  const Scratch<int32_t> total(p.m * groups);
  const Int8Task task = make_int8_task(p, end, total);
  const Scratch<Tables> tables(1);
  const Scratch<Kept> kept(ceil_div(end - begin, kBlockTiles) * kRows);
  for (int64_t row = 0; row < p.m; row += kRows) {  // rows that are missing are not stored
    const int64_t count = p.m - row < kRows ? p.m - row : kRows;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t last = task.group_end(group);
      for (int64_t w = group * task.group_words; w < last; w += kSpanWords) {
        const Span span{group, w, w + kSpanWords < last ? kSpanWords : last - w};
        tables.get()->build(p.q + row * p.k, count, p.k, span);
        multiply_span(task, row, count, begin, span, tables.get()->entries(), kept);
      }
    }
  }
}

}  // namespace bitmill::detail
