// SPDX-License-Identifier: Apache-2.0
// What scores and contexts of binary attention share with AVX2, which cannot count bits. A vpshufb looks 4 columns of
// 32 keys up, in a table that 4 bits of a query choose, and their counts are summed in bytes: 32 scores in one vector.
// The same steps with 4 bits of the map and 4 keys of 32 channels make the context. Four rows share what is loaded of
// 64 keys or channels.
#pragma once

#include <bit>

#include "avx2.h"
#include "binary_attention_task.h"
#include "layout.h"

namespace bitmill::detail {

// Some rows of one matrix of the batch. With zeros in queries or keys a distance is d - dot, else (d - dot) / 2.
struct AttentionBlock {
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  const AttentionTask& t;
  int64_t batch, first, rows;  // the last four rows may reach past the end: they are computed, but not used
  bool zeros;
  const uint32_t* const* keep;  // [rows]
  int64_t next_offsets;         // 8 max(words, map_words)
  uint16_t* offsets;            // [rows][next_offsets], of the queries, and then of the map
  uint8_t* distance;            // [rows][32 map_words], or null: the rule looks at single keys
  uint32_t* bits;               // [rows][map_words], of the map
  int32_t* count;               // [rows], set bits
  float* addend;                // [rows], of the context
  Line *plus, *minus;           // [8 kMostWords]
  int32_t* whole;               // [rows][kColumns], of the context
};

// The contexts of all rows, from `offsets`, `count` and `addend` of their maps.
void make_contexts_avx2(const AttentionBlock& b);

namespace {

using Block = AttentionBlock;
using Line = AttentionBlock::Line;

constexpr int64_t kRows = 4;       // rows together
constexpr int64_t kColumns = 64;   // keys or channels together: two vectors
constexpr int64_t kMostWords = 7;  // counts up to 7 * 32 fit into bytes

// Of 4 bits x, for lookups of 16 values of x at once.
struct Tables {
  alignas(64) uint8_t opposite[16][16];  // [s][x]: how many differ from s
  uint8_t balance[16][16][16];           // [s][z][x]: of those set in z, how many are not in s less how many are
};
static constexpr Tables make_tables() {
  Tables tables{};
  for (unsigned s = 0; s < 16; ++s) {
    for (unsigned x = 0; x < 16; ++x) {
      tables.opposite[s][x] = static_cast<uint8_t>(std::popcount(s ^ x));
      for (unsigned z = 0; z < 16; ++z) {
        tables.balance[s][z][x] = static_cast<uint8_t>(std::popcount(x & z & ~s) - std::popcount(x & z & s));
      }
    }
  }
  return tables;
}
constexpr Tables kTables = make_tables();
constexpr int kBalance = sizeof(kTables.opposite);  // where they begin; those of s = 0 count bits set in z and in x

// Where the tables of the 8 times 4 bits of a word are: entries [high][low] of 16 bytes, after `base` bytes.
static inline void put_offsets(uint32_t high, uint32_t low, int base, uint16_t* offsets) {
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), nibble = _mm256_set1_epi32(15);
  const auto nibbles = [&](uint32_t word) {
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts), nibble);
  };
  const __m256i entry = _mm256_or_si256(_mm256_slli_epi32(nibbles(high), 8), _mm256_slli_epi32(nibbles(low), 4));
  const __m256i at = _mm256_add_epi32(entry, _mm256_set1_epi32(base));
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(at), _mm256_extracti128_si256(at, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(offsets), packed);
}

// Two tiles of a plane of bits, or of the signs of one kind: those that are set, or those that are not, and not 0.
struct Signs {
  const int32_t *sign, *nonzero;  // `nonzero` is null if nothing is 0
  int64_t second;                 // words from the first tile to the second
  bool minus = false;

  __m256i words(int64_t at) const {
    __m256i x = load_bits(sign + at);
    if (minus) x = _mm256_xor_si256(x, _mm256_set1_epi32(-1));
    return nonzero ? _mm256_and_si256(x, load_bits(nonzero + at)) : x;
  }
};

// Word `at` of 32 rows to 8 vectors of 32 times 4 bits, the lowest columns first, one a line.
static inline void split(const Signs& x, int64_t at, int half, Line* lines) {
  const auto put = [&](int byte, __m256i columns) {
    const __m256i nibble = _mm256_set1_epi8(15), ordered = in_order(columns);
    store_bits(lines[2 * byte].bytes + 32 * half, _mm256_and_si256(ordered, nibble));
    store_bits(lines[2 * byte + 1].bytes + 32 * half, _mm256_and_si256(_mm256_srli_epi16(ordered, 4), nibble));
  };
  split_bytes(x.words(at), x.words(at + 8), x.words(at + x.second), x.words(at + x.second + 8), put);
}

struct Row {  // named, not an array: g++ keeps an indexed array of accumulators in memory
  __m256i c0, c1;
};
struct Sums {
  Row r0, r1, r2, r3;
};

// What was split: bits, or with zeros the bits of +1 and those of -1.
struct Split {
  const Line *plus, *minus;
};

template <int vectors, bool zeros>
[[gnu::always_inline]] static inline void step(Row& row, uint16_t offset, __m256i p0, __m256i p1, __m256i m0,
                                               __m256i m1) {
  const uint8_t* entry = &kTables.opposite[0][0] + offset;
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entry)));
  row.c0 = _mm256_add_epi8(row.c0, _mm256_shuffle_epi8(table, p0));
  if constexpr (zeros) row.c0 = _mm256_sub_epi8(row.c0, _mm256_shuffle_epi8(table, m0));
  settle(row.c0);  // keeps the steps of one sum together; otherwise g++ runs out of registers
  if constexpr (vectors > 1) {
    row.c1 = _mm256_add_epi8(row.c1, _mm256_shuffle_epi8(table, p1));
    if constexpr (zeros) row.c1 = _mm256_sub_epi8(row.c1, _mm256_shuffle_epi8(table, m1));
    settle(row.c1);
  }
}

// Sums over `words` words of four rows of offsets, `next` apart, from `start` on.
template <int vectors, bool zeros>
[[gnu::always_inline]] static inline Sums sum_up(const uint16_t* offsets, int64_t next, const Split& split,
                                                 int64_t words, __m256i start) {
  Row r0{start, start}, r1 = r0, r2 = r0, r3 = r0;
  const uint16_t *o0 = offsets, *o1 = o0 + next, *o2 = o1 + next, *o3 = o2 + next, *stop = o0 + 8 * words;
  const Line *plus = split.plus, *minus = split.minus;
  for (; o0 < stop; o0 += 4, o1 += 4, o2 += 4, o3 += 4, plus += 4, minus += 4) {
    asm("" : "+r"(o1), "+r"(o2), "+r"(o3));  // four pointers; otherwise g++ keeps twelve distances from o0
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i p0 = load_bits(plus[i].bytes), p1 = vectors > 1 ? load_bits(plus[i].bytes + 32) : p0;
      const __m256i m0 = zeros ? load_bits(minus[i].bytes) : p0,
                    m1 = zeros && vectors > 1 ? load_bits(minus[i].bytes + 32) : p0;
      step<vectors, zeros>(r0, o0[i], p0, p1, m0, m1);
      step<vectors, zeros>(r1, o1[i], p0, p1, m0, m1);
      step<vectors, zeros>(r2, o2[i], p0, p1, m0, m1);
      step<vectors, zeros>(r3, o3[i], p0, p1, m0, m1);
    }
  }
  return {r0, r1, r2, r3};
}

}  // namespace
}  // namespace bitmill::detail
