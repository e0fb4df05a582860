// SPDX-License-Identifier: Apache-2.0
// Binary products with AVX2, which cannot count bits: 4 columns of 32 outputs are one vpshufb whose table the
// activation chooses. A table row answers pc((s ^ w) & z) for the 16 values of four weight bits w; s and z are four
// sign and four nonzero bits of the activation, so 256 rows (4 KB) serve every operand. That is one shuffle and one
// byte addition for 128 products, against eight instructions for 256 with the usual nibble count. Both operands are
// prepared: activations become table offsets, once for a block of rows; weights become one vector of 32 nibbles for
// every 4 columns, once for a block of outputs and those rows. Bit-equal to the generic form, epilogue included.
// Weights with zeros are rare and take the generic form.
#include "avx2.h"
#include "binary_tiles.h"

namespace bitmill::detail {
namespace {

constexpr int kColumns = 64;  // outputs side by side: two vectors of 32 bytes
constexpr int kTiles = kColumns / kTileRows;
constexpr int64_t kByteWords = 7;          // words that a byte can count: 7 * 32 < 256
constexpr int64_t kShortWords = 2047;      // words that 16 bits can count
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

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

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

// One word of two tiles to eight vectors of nibbles, the lowest columns first, kColumns bytes apart. Byte j of a
// vector is output 0-7, 16-23 (low lane), 8-15, 24-31 (high lane): unpacking to 16 bits then gives outputs in order.
void split_word(const int32_t* first, const int32_t* second, uint8_t* out) {
  const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                          0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7), nibble = _mm256_set1_epi8(15);
  const auto bytes = [&](const int32_t* words) { return _mm256_shuffle_epi8(load(words), gather); };
  const __m256i a = bytes(first), b = bytes(first + 8), c = bytes(second), d = bytes(second + 8);
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  const auto put = [&](int byte, __m256i columns) {
    columns = _mm256_permutevar8x32_epi32(columns, order);
    store(out + 2 * byte * kColumns, _mm256_and_si256(columns, nibble));
    store(out + (2 * byte + 1) * kColumns, _mm256_and_si256(_mm256_srli_epi16(columns, 4), nibble));
  };
  put(0, _mm256_unpacklo_epi64(ab_low, cd_low));
  put(1, _mm256_unpackhi_epi64(ab_low, cd_low));
  put(2, _mm256_unpacklo_epi64(ab_high, cd_high));
  put(3, _mm256_unpackhi_epi64(ab_high, cd_high));
}

void split_tiles(const BinaryTask& task, int64_t tile, int64_t end, uint8_t* nibbles) {
  const auto at = [&](int64_t t) { return task.p.weight + (t < end ? t : end - 1) * task.words * kTileRows; };
  const int32_t *w0 = at(tile), *w1 = at(tile + 1), *w2 = at(tile + 2), *w3 = at(tile + 3);
  for (int64_t w = 0; w < task.words; ++w, nibbles += 8 * kColumns) {
    split_word(w0 + w * kTileRows, w1 + w * kTileRows, nibbles);
    split_word(w2 + w * kTileRows, w3 + w * kTileRows, nibbles + 32);
  }
}

struct Row {  // named, not an array: g++ keeps an indexed array of accumulators in memory
  __m256i c0, c1;
};

void step(Row& row, uint16_t offset, __m256i w0, __m256i w1) {
  const uint8_t* entry = &kTables.row[0][0] + offset;
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entry)));
  row.c0 = _mm256_add_epi8(row.c0, _mm256_shuffle_epi8(table, w0));
  asm volatile("" : "+x"(row.c0));  // keeps shuffle and addition together; otherwise g++ runs out of registers
  row.c1 = _mm256_add_epi8(row.c1, _mm256_shuffle_epi8(table, w1));
  asm volatile("" : "+x"(row.c1));
}

// Bytes to 16 bits, in the order of the outputs.
void widen(Row counts, bool first, uint16_t* sums) {
  const __m256i zero = _mm256_setzero_si256();
  const auto put = [&](int i, __m256i v) { store(sums + i, first ? v : _mm256_add_epi16(load(sums + i), v)); };
  put(0, _mm256_unpacklo_epi8(counts.c0, zero));
  put(16, _mm256_unpackhi_epi8(counts.c0, zero));
  put(32, _mm256_unpacklo_epi8(counts.c1, zero));
  put(48, _mm256_unpackhi_epi8(counts.c1, zero));
}

void widen(const uint16_t* sums, bool first, int32_t* opposite) {
  for (int i = 0; i < kColumns; i += 8) {
    const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sums + i)));
    store(opposite + i, first ? v : _mm256_add_epi32(load(opposite + i), v));
  }
}

// The opposite bits of `rows` rows over words [begin, end).
template <int rows>
void count(const BinaryTask& task, const uint16_t* offsets, const uint8_t* nibbles, int64_t begin, int64_t end,
           int32_t (&opposite)[rows][kColumns]) {
  const int64_t next = rows > 1 ? 8 * task.words : 0;
  alignas(64) uint16_t sums[rows][kColumns];
  for (int64_t run = begin; run < end; run += kShortWords) {
    const int64_t run_end = run + kShortWords < end ? run + kShortWords : end;
    for (int64_t part = run; part < run_end; part += kByteWords) {
      const int64_t part_end = part + kByteWords < run_end ? part + kByteWords : run_end;
      const __m256i zero = _mm256_setzero_si256();
      Row r0{zero, zero}, r1 = r0, r2 = r0, r3 = r0;
      const uint8_t* weight = nibbles + 8 * part * kColumns;
      const uint16_t *o0 = offsets + 8 * part, *stop = offsets + 8 * part_end;
      const uint16_t *o1 = o0 + next, *o2 = o1 + next, *o3 = o2 + next;
      for (; o0 < stop; o0 += 4, o1 += 4, o2 += 4, o3 += 4, weight += 4 * kColumns) {
        asm("" : "+r"(o1), "+r"(o2), "+r"(o3));  // four pointers; otherwise g++ keeps twelve distances from o0
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i w0 = load(weight + i * kColumns), w1 = load(weight + i * kColumns + 32);
          step(r0, o0[i], w0, w1);
          if constexpr (rows > 1) {
            step(r1, o1[i], w0, w1);
            step(r2, o2[i], w0, w1);
            step(r3, o3[i], w0, w1);
          }
        }
      }
      widen(r0, part == run, sums[0]);
      if constexpr (rows > 1) {
        widen(r1, part == run, sums[1]);
        widen(r2, part == run, sums[2]);
        widen(r3, part == run, sums[3]);
      }
    }
    for (int row = 0; row < rows; ++row) widen(sums[row], run == begin, opposite[row]);
  }
}

template <int rows>
void block(const BinaryTask& task, const OutputBlock<kColumns>& outputs, int64_t row, const uint16_t* offsets,
           const uint8_t* nibbles) {
  alignas(64) int32_t opposite[rows][kColumns];
  alignas(64) float sums[rows][kColumns];
  const auto convert = [](const float* value, auto* out) {
    for (int i = 0; i < kColumns; i += 8) store8(out + i, _mm256_loadu_ps(value + i));
  };
  for (int64_t group = 0; group < task.groups; ++group) {
    count<rows>(task, offsets, nibbles, group * task.group_words, task.group_end(group), opposite);
    for (int i = 0; i < rows; ++i) finish_row(task, outputs, row + i, group, opposite[i], sums[i], convert);
  }
}

}  // namespace

void binary_matmul_tiles_avx2(const BinaryMatmulParams& p, int64_t begin, int64_t end) {
  if (p.weight_nonzero || p.k == 0) return binary_matmul_tiles_generic(p, begin, end);
  const BinaryTask task = make_task(p);
  const int64_t words = task.words;
  int64_t block_rows = kOffsetBytes / (16 * words) / 4 * 4;
  if (block_rows < 4) block_rows = 4;
  if (block_rows > p.m) block_rows = p.m;
  Line* nibbles = new Line[8 * words];
  uint16_t* offsets = new uint16_t[8 * words * block_rows];
  OutputBlock<kColumns> outputs;
  outputs.scale = new float[task.groups * kColumns];
  for (int64_t top = 0; top < p.m; top += block_rows) {
    const int64_t bottom = top + block_rows < p.m ? top + block_rows : p.m;
    make_offsets(p, top * words, bottom * words, offsets);
    for (int64_t tile = begin; tile < end; tile += kTiles) {
      split_tiles(task, tile, end, nibbles->bytes);
      load_block(task, tile, end, outputs);
      int64_t row = top;
      const auto at = [&](int64_t r) { return offsets + (r - top) * 8 * words; };
      for (; row + 4 <= bottom; row += 4) block<4>(task, outputs, row, at(row), nibbles->bytes);
      for (; row < bottom; ++row) block<1>(task, outputs, row, at(row), nibbles->bytes);
    }
  }
  delete[] outputs.scale;
  delete[] offsets;
  delete[] nibbles;
  delete[] task.present;
}

}  // namespace bitmill::detail
