// SPDX-License-Identifier: Apache-2.0
// Binary products with AVX2, which cannot count bits: 4 columns of 32 outputs are one vpshufb whose table the
// activation chooses. A table row answers pc((s ^ w) & z) for the 16 values of four weight bits w; s and z are four
// sign and four nonzero bits of the activation, so 256 rows (4 KB) serve every operand. That is one shuffle and one
// byte addition for 128 products, against eight instructions for 256 with the usual nibble count. Both operands are
// prepared: activations become table offsets, once for a block of rows; weights become one vector of 32 nibbles for
// every 4 columns, once for a block of outputs and those rows. A few rows do not pay for that: they count nibbles of
// the words as they are stored. Bit-equal to the generic form, epilogue included. No weight is
// 0 here (zero_weights.h).
#include "avx2.h"
#include "binary_tiles.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int kColumns = 64;  // outputs side by side: two vectors of 32 bytes
constexpr int kTiles = kColumns / kTileRows;
constexpr int64_t kFewRows = 8;            // so many rows pay for the preparation
constexpr int64_t kByteWords = 7;          // words that a byte can count by lookups: 7 * 32 < 256
constexpr int64_t kByteNibbles = 31;       // words that a byte can count when it sees 8 bits of each
constexpr int64_t kParts = 16;             // counts in bytes that are kept before they become integers
constexpr int64_t kOffsetBytes = 1 << 18;  // a block of rows has about so many bytes of offsets: they stay in L2

struct Tables {
  alignas(64) uint8_t row[256][16];
};
constexpr Tables make_tables() {
  Tables tables{};
  for (int z = 0; z < 16; ++z) {
    for (int s = 0; s < 16; ++s) {
      for (int w = 0; w < 16; ++w) {
        const int bits = (s ^ w) & z;
        tables.row[16 * z + s][w] = static_cast<uint8_t>((bits & 1) + (bits >> 1 & 1) + (bits >> 2 & 1) + (bits >> 3));
      }
    }
  }
  return tables;
}
constexpr Tables kTables = make_tables();

struct alignas(64) Line {
  uint8_t bytes[64];
};

// Eight offsets of table rows a word.
void make_offsets(const BinaryMatmulParams& p, int64_t begin, int64_t end, uint16_t* offsets) {
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), nibble = _mm256_set1_epi32(15);
  for (int64_t w = begin; w < end; ++w, offsets += 8) {
    const __m256i s = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(p.a[w]), shifts), nibble);
    const __m256i present = _mm256_set1_epi32(static_cast<int>(nonzero_word(p, w)));
    const __m256i z = _mm256_and_si256(_mm256_srlv_epi32(present, shifts), nibble);
    const __m256i offset = _mm256_or_si256(_mm256_slli_epi32(s, 4), _mm256_slli_epi32(z, 8));
    const __m128i low = _mm256_castsi256_si128(offset), high = _mm256_extracti128_si256(offset, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(offsets), _mm_packus_epi32(low, high));
  }
}

void split_tiles(const BinaryTask& task, int64_t tile, int64_t end, uint8_t* nibbles) {
  const auto at = [&](int64_t t) { return task.p.weight + (t < end ? t : end - 1) * task.words * kTileRows; };
  const int32_t *w0 = at(tile), *w1 = at(tile + 1), *w2 = at(tile + 2), *w3 = at(tile + 3);
  for (int64_t w = 0; w < task.words; ++w, nibbles += 8 * kColumns) {
    split_nibbles(w0 + w * kTileRows, w1 + w * kTileRows, nibbles, kColumns);
    split_nibbles(w2 + w * kTileRows, w3 + w * kTileRows, nibbles + 32, kColumns);
  }
}

struct Row {  // named, not an array: g++ keeps an indexed array of accumulators in memory
  __m256i c0, c1;
};

void step(Row& row, uint16_t offset, __m256i w0, __m256i w1) {
  const uint8_t* entry = &kTables.row[0][0] + offset;
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entry)));
  row.c0 = _mm256_add_epi8(row.c0, _mm256_shuffle_epi8(table, w0));
  settle(row.c0);  // keeps shuffle and addition together; otherwise g++ runs out of registers
  row.c1 = _mm256_add_epi8(row.c1, _mm256_shuffle_epi8(table, w1));
  settle(row.c1);
}

// Words a part, so that the parts of a run are about equally long: a loop that always ends alike is predicted.
int64_t words_of_part(int64_t words, int64_t most) {
  return words <= most ? words : ceil_div(words, ceil_div(words, most));
}

// Counts [parts][kColumns] in bytes to integers, in the order of the outputs.
void add_parts(const Line* bytes, int64_t parts, bool first, int32_t* opposite) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i s0 = zero, s1 = zero, s2 = zero, s3 = zero;
  for (int64_t i = 0; i < parts; ++i) {
    const __m256i low = load_bits(bytes[i].bytes), high = load_bits(bytes[i].bytes + 32);
    s0 = _mm256_add_epi16(s0, _mm256_unpacklo_epi8(low, zero));
    s1 = _mm256_add_epi16(s1, _mm256_unpackhi_epi8(low, zero));
    s2 = _mm256_add_epi16(s2, _mm256_unpacklo_epi8(high, zero));
    s3 = _mm256_add_epi16(s3, _mm256_unpackhi_epi8(high, zero));
  }
  const auto put = [&](int32_t* to, __m256i sums) {
    store_bits(to, first ? sums : _mm256_add_epi32(load_bits(to), sums));
  };
  const auto put_both = [&](int32_t* to, __m256i sums) {
    put(to, _mm256_unpacklo_epi16(sums, zero)), put(to + 8, _mm256_unpackhi_epi16(sums, zero));
  };
  put_both(opposite, s0), put_both(opposite + 16, s1), put_both(opposite + 32, s2), put_both(opposite + 48, s3);
}

// The opposite bits of `rows` rows over words [begin, end).
template <int rows>
void count(const BinaryTask& task, const uint16_t* offsets, const uint8_t* nibbles, int64_t begin, int64_t end,
           int32_t (&opposite)[rows][kColumns]) {
  const int64_t next = rows > 1 ? 8 * task.words : 0, step_words = words_of_part(end - begin, kByteWords);
  Line bytes[rows][kParts];
  const auto keep = [](Line& to, Row counts) { store_bits(to.bytes, counts.c0), store_bits(to.bytes + 32, counts.c1); };
  for (int64_t run = begin; run < end; run += kParts * step_words) {
    int64_t parts = 0;
    for (int64_t part = run; parts < kParts && part < end; part += step_words, ++parts) {
      const int64_t part_end = part + step_words < end ? part + step_words : end;
      const __m256i zero = _mm256_setzero_si256();
      Row r0{zero, zero}, r1 = r0, r2 = r0, r3 = r0;
      const uint8_t* weight = nibbles + 8 * part * kColumns;
      const uint16_t *o0 = offsets + 8 * part, *stop = offsets + 8 * part_end;
      const uint16_t *o1 = o0 + next, *o2 = o1 + next, *o3 = o2 + next;
      for (; o0 < stop; o0 += 4, o1 += 4, o2 += 4, o3 += 4, weight += 4 * kColumns) {
        asm("" : "+r"(o1), "+r"(o2), "+r"(o3));  // four pointers; otherwise g++ keeps twelve distances from o0
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i w0 = load_bits(weight + i * kColumns), w1 = load_bits(weight + i * kColumns + 32);
          step(r0, o0[i], w0, w1);
          if constexpr (rows > 1) {
            step(r1, o1[i], w0, w1);
            step(r2, o2[i], w0, w1);
            step(r3, o3[i], w0, w1);
          }
        }
      }
      keep(bytes[0][parts], r0);
      if constexpr (rows > 1) keep(bytes[1][parts], r1), keep(bytes[2][parts], r2), keep(bytes[3][parts], r3);
    }
    for (int row = 0; row < rows; ++row) add_parts(bytes[row], parts, run == begin, opposite[row]);
  }
}

// inside_range, 8 lanes at once.
constexpr auto inside = [](const int32_t* range, int64_t n, int64_t column, const int32_t* dot, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                  left = _mm256_set1_epi32(static_cast<int>(count - i));
    const __m256i exist = _mm256_cmpgt_epi32(left, lanes);
    const __m256i first = _mm256_maskload_epi32(range + column + i, exist);
    const __m256i width = _mm256_sub_epi32(_mm256_maskload_epi32(range + n + column + i, exist), first);
    const __m256i distance = _mm256_sub_epi32(load_bits(dot + i), first);
    const __m256i is_inside = _mm256_cmpeq_epi32(_mm256_min_epu32(distance, width), distance);
    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_and_si256(is_inside, exist)));
    found |= static_cast<uint32_t>(mask) << i;
  }
  return found;
};

// A row of floats as another dtype.
constexpr auto convert = [](const float* value, auto* out) {
  for (int i = 0; i < kColumns; i += 8) store8(out + i, _mm256_loadu_ps(value + i));
};

template <int rows>
void block(const BinaryTask& task, const OutputBlock<kColumns>& outputs, int64_t row, const uint16_t* offsets,
           const uint8_t* nibbles) {
  alignas(64) int32_t opposite[rows][kColumns];
  alignas(64) float sums[rows][kColumns];
  for (int64_t group = 0; group < task.groups; ++group) {
    count<rows>(task, offsets, nibbles, group * task.group_words, task.group_end(group), opposite);
    for (int i = 0; i < rows; ++i) finish_row(task, outputs, row + i, group, opposite[i], sums[i], convert, inside);
  }
}

// The opposite bits of one row over words [begin, end), from weights as they are stored: a lane is an output.
template <bool masked>
void count_stored(const BinaryTask& task, const int32_t* const (&weight)[kTiles], int64_t row, int64_t begin,
                  int64_t end, int32_t* opposite) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i bits = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const int64_t at = row * task.words, step_words = words_of_part(end - begin, kByteNibbles);
  for (int64_t part = begin; part < end; part += step_words) {
    const int64_t part_end = part + step_words < end ? part + step_words : end;
    __m256i counts[2 * kTiles];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kTiles; ++i) counts[i] = _mm256_setzero_si256();
    for (int64_t w = part; w < part_end; ++w) {
      const __m256i s = _mm256_set1_epi32(task.p.a[at + w]);
      const __m256i z = _mm256_set1_epi32(masked ? static_cast<int>(nonzero_word(task.p, at + w)) : -1);
#pragma GCC unroll 8
      for (int i = 0; i < 2 * kTiles; ++i) {
        __m256i x = _mm256_xor_si256(s, load_bits(weight[i / 2] + w * kTileRows + i % 2 * 8));
        if (masked) x = _mm256_and_si256(x, z);
        const __m256i low = _mm256_shuffle_epi8(bits, _mm256_and_si256(x, nibble));
        const __m256i high = _mm256_shuffle_epi8(bits, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
        counts[i] = _mm256_add_epi8(counts[i], _mm256_add_epi8(low, high));
        settle(counts[i]);  // one after the other; otherwise g++ runs out of registers
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kTiles; ++i) {
      const __m256i pairs = _mm256_maddubs_epi16(counts[i], _mm256_set1_epi8(1));
      const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
      store_bits(opposite + 8 * i, part == begin ? sums : _mm256_add_epi32(load_bits(opposite + 8 * i), sums));
    }
  }
}

void multiply_stored(const BinaryTask& task, int64_t begin, int64_t end, OutputBlock<kColumns>& outputs) {
  for (int64_t tile = begin; tile < end; tile += kTiles) {
    const int32_t* weight[kTiles];  // tiles past the end repeat the last one
    for (int64_t i = 0; i < kTiles; ++i) {
      weight[i] = task.p.weight + (tile + i < end ? tile + i : end - 1) * task.words * kTileRows;
    }
    load_block(task, tile, end, outputs);
    alignas(64) int32_t opposite[kColumns];
    alignas(64) float sums[kColumns];
    for (int64_t row = 0; row < task.p.m; ++row) {
      for (int64_t group = 0; group < task.groups; ++group) {
        auto* count = task.p.operand == Operand::sign ? count_stored<false> : count_stored<true>;
        count(task, weight, row, group * task.group_words, task.group_end(group), opposite);
        finish_row(task, outputs, row, group, opposite, sums, convert, inside);
      }
    }
  }
}

void multiply_prepared(const BinaryTask& task, int64_t begin, int64_t end, OutputBlock<kColumns>& outputs) {
  const BinaryMatmulParams& p = task.p;
  const int64_t words = task.words;
  int64_t block_rows = kOffsetBytes / (16 * words) / 4 * 4;
  if (block_rows < 4) block_rows = 4;
  if (block_rows > p.m) block_rows = p.m;
  const Scratch<Line> nibbles(8 * words);
  const Scratch<uint16_t> offsets(8 * words * block_rows);
  for (int64_t top = 0; top < p.m; top += block_rows) {
    const int64_t bottom = top + block_rows < p.m ? top + block_rows : p.m;
    make_offsets(p, top * words, bottom * words, offsets);
    for (int64_t tile = begin; tile < end; tile += kTiles) {
      split_tiles(task, tile, end, nibbles.get()->bytes);
      load_block(task, tile, end, outputs);
      int64_t row = top;
      const auto at = [&](int64_t r) { return offsets + (r - top) * 8 * words; };
      for (; row + 4 <= bottom; row += 4) block<4>(task, outputs, row, at(row), nibbles.get()->bytes);
      for (; row < bottom; ++row) block<1>(task, outputs, row, at(row), nibbles.get()->bytes);
    }
  }
}

}  // namespace

void binary_matmul_tiles_avx2(const BinaryMatmulParams& p, int64_t begin, int64_t end) {
  if (p.k == 0) return binary_matmul_tiles_generic(p, begin, end);
  const BinaryTask task(p);
  OutputBlock<kColumns> outputs;
  const Scratch<float> scale(task.groups * kColumns);
  outputs.scale = scale;
  (p.m < kFewRows ? multiply_stored : multiply_prepared)(task, begin, end, outputs);
}

}  // namespace bitmill::detail
