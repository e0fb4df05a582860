// SPDX-License-Identifier: Apache-2.0
// The salient part with int8 activations for many rows. They are transposed to [column][64] bytes, and 4 salient
// weights are one vpdpbusd for 16 of them.
#include "salient_int8_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kBlockRows = 64;        // rows transposed together
constexpr int64_t kListSteps = 64;        // of a list, decoded together
constexpr int64_t kBitmapColumns = 2048;  // of a bitmap, decoded together

// The factors of a tile's outputs, from memory: what is computed for an output has the rows as lanes.
struct OutputFactors {
  alignas(64) float scale[kTileRows], zero[kTileRows];
  float base[kTileRows], mu[kTileRows];

  explicit OutputFactors(const TileFactors& factors) {
    _mm512_store_ps(scale, factors.scale), _mm512_store_ps(zero, factors.zero);
    _mm512_storeu_ps(base, _mm512_loadu_ps(factors.base));
    _mm512_storeu_ps(mu, factors.mu ? _mm512_loadu_ps(factors.mu) : _mm512_setzero_ps());
  }
};

// Sums of a tile for 64 rows of activations: of codes and of activations, while entries follow, and what they come to.
struct Sums {
  alignas(64) float value[kTileRows][kBlockRows];
  int32_t code[kTileRows][kBlockRows], plain[kTileRows][kBlockRows];
};

// Entries of one output, four at a time: columns, `stride` apart, and their codes, 4 bytes that lie `code_stride`
// apart.
struct Entries {
  const int32_t* column;
  const uint8_t* code;
  int64_t fours;
};

// What is decoded together: entries of the outputs of a tile.
struct Chunk {
  Entries of_output[kTileRows];
  int64_t stride, code_stride;
  bool begins, ends;  // the sums
};

// Rows of activations, 64 at a time: `count` blocks of `size` = (width + 1) x 64 bytes, columns first. The last column
// is 0.
struct Blocks {
  const int8_t* q;
  int64_t size, count;
};

// Adds entries to the sums of one output. q: a block.
void add_entries(const Chunk& chunk, int64_t lane, const int8_t* q, const OutputFactors& factors, Sums& sums) {
  const auto before = [&chunk](const int32_t* from) {
    return chunk.begins ? _mm512_setzero_si512() : _mm512_load_si512(from);
  };
  int32_t *const code = sums.code[lane], *const plain = sums.plain[lane];
  __m512i c0 = before(code), c1 = before(code + 16), c2 = before(code + 32), c3 = before(code + 48);
  __m512i t0 = before(plain), t1 = before(plain + 16), t2 = before(plain + 32), t3 = before(plain + 48);
  const __m512i ones = _mm512_set1_epi8(1);
  const int64_t stride = chunk.stride;
  for (Entries left = chunk.of_output[lane]; left.fours > 0; --left.fours) {
    const auto load = [&](int64_t j) { return _mm512_load_si512(q + int64_t{left.column[j * stride]} * kBlockRows); };
    const __m512i a = load(0), b = load(1), c = load(2), d = load(3);
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    const __m512i p0 = _mm512_unpacklo_epi16(ab_low, cd_low), p1 = _mm512_unpackhi_epi16(ab_low, cd_low);
    const __m512i p2 = _mm512_unpacklo_epi16(ab_high, cd_high), p3 = _mm512_unpackhi_epi16(ab_high, cd_high);
    int32_t four;
    __builtin_memcpy(&four, left.code, sizeof(four));
    const __m512i v = _mm512_set1_epi32(four);
    c0 = _mm512_dpbusd_epi32(c0, v, p0), t0 = _mm512_dpbusd_epi32(t0, ones, p0);
    c1 = _mm512_dpbusd_epi32(c1, v, p1), t1 = _mm512_dpbusd_epi32(t1, ones, p1);
    c2 = _mm512_dpbusd_epi32(c2, v, p2), t2 = _mm512_dpbusd_epi32(t2, ones, p2);
    c3 = _mm512_dpbusd_epi32(c3, v, p3), t3 = _mm512_dpbusd_epi32(t3, ones, p3);
    left.column += 4 * stride, left.code += chunk.code_stride;
  }
  if (chunk.ends) {
    const __m512 zero = _mm512_set1_ps(factors.zero[lane]), scale = _mm512_set1_ps(factors.scale[lane]);
    const __m512 base = _mm512_set1_ps(factors.base[lane]);
    const auto put = [&](int64_t row, __m512i of_codes, __m512i of_activations) {
      const __m512 t = _mm512_cvtepi32_ps(of_activations);
      const __m512 salient = _mm512_mul_ps(scale, _mm512_fnmadd_ps(zero, t, _mm512_cvtepi32_ps(of_codes)));
      _mm512_store_ps(sums.value[lane] + row, _mm512_fnmadd_ps(base, t, salient));
    };
    put(0, c0, t0), put(16, c1, t1), put(32, c2, t2), put(48, c3, t3);
    return;
  }
  _mm512_store_si512(code, c0), _mm512_store_si512(code + 16, c1);
  _mm512_store_si512(code + 32, c2), _mm512_store_si512(code + 48, c3);
  _mm512_store_si512(plain, t0), _mm512_store_si512(plain + 16, t1);
  _mm512_store_si512(plain + 32, t2), _mm512_store_si512(plain + 48, t3);
}

// Block by block: what a block reads of the activations stays in the first-level cache for 16 outputs.
void add_chunk(const Chunk& chunk, const Blocks& blocks, const OutputFactors& factors, Sums* sums) {
  for (int64_t i = 0; i < blocks.count; ++i) {
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      add_entries(chunk, lane, blocks.q + i * blocks.size, factors, sums[i]);
    }
  }
}

void add_list(const SalientWeight& w, int64_t tile, const Blocks& blocks, const OutputFactors& factors, Sums* sums) {
  const __m256i last = _mm256_set1_epi16(static_cast<int16_t>(w.k - 1));
  const __m512i zeros = _mm512_set1_epi32(static_cast<int>(w.k));  // the row of zeros after the last column
  __m256i column = _mm256_set1_epi16(-1);
  alignas(64) int32_t columns[kListSteps][kTileRows];
  alignas(64) uint8_t codes[kListSteps / 4][4 * kTileRows];
  Chunk chunk{{}, kTileRows, 4 * kTileRows, true, false};
  int64_t step = w.start[tile];
  do {
    int64_t fours = 0;
    for (; fours < kListSteps / 4 && step < w.start[tile + 1]; ++fours) {
      __m128i bytes[4];
      for (int i = 0; i < 4; ++i, ++step) {
        bytes[i] = _mm_setzero_si128();
        __m512i wide = zeros;
        if (step < w.start[tile + 1]) {
          const auto* gap = reinterpret_cast<const __m128i*>(w.gap + step * kTileRows);
          const auto* value = static_cast<const __m128i*>(w.value) + step;
          const __m128i gaps = _mm_loadu_si128(gap);
          const __mmask16 entries = _mm_cmpneq_epu8_mask(gaps, _mm_set1_epi8(static_cast<char>(kNoEntry)));
          column = next_columns(column, gaps, entries);
          wide = _mm512_mask_cvtepu16_epi32(zeros, entries, _mm256_min_epu16(column, last));
          bytes[i] = _mm_loadu_si128(value);
        }
        _mm512_store_si512(columns[4 * fours + i], wide);
      }
      // 4 steps of 16 bytes to 16 words of 4
      const __m128i a = _mm_unpacklo_epi8(bytes[0], bytes[1]), b = _mm_unpackhi_epi8(bytes[0], bytes[1]);
      const __m128i c = _mm_unpacklo_epi8(bytes[2], bytes[3]), d = _mm_unpackhi_epi8(bytes[2], bytes[3]);
      auto* out = reinterpret_cast<__m128i*>(codes[fours]);
      _mm_store_si128(out, _mm_unpacklo_epi16(a, c));
      _mm_store_si128(out + 1, _mm_unpackhi_epi16(a, c));
      _mm_store_si128(out + 2, _mm_unpacklo_epi16(b, d));
      _mm_store_si128(out + 3, _mm_unpackhi_epi16(b, d));
    }
    for (int64_t lane = 0; lane < kTileRows; ++lane)
      chunk.of_output[lane] = {columns[0] + lane, codes[0] + 4 * lane, fours};
    chunk.ends = step >= w.start[tile + 1];
    add_chunk(chunk, blocks, factors, sums);
    chunk.begins = false;
  } while (!chunk.ends);
}

// `every`: 0, 1, 2, ... up to the width.
void add_columns(const SalientInt8Rows& rows, int64_t tile, const Blocks& blocks, const OutputFactors& factors,
                 const int32_t* every, Sums* sums) {
  const int64_t words = rows.width / 4;
  const auto* value = static_cast<const uint8_t*>(rows.task.weight.value) + tile * rows.width * kTileRows;
  Chunk chunk{{}, 1, 4 * kTileRows, true, true};
  for (int64_t lane = 0; lane < kTileRows; ++lane) chunk.of_output[lane] = {every, value + 4 * lane, words};
  add_chunk(chunk, blocks, factors, sums);
}

void add_bitmap(const SalientWeight& w, int64_t tile, const Blocks& blocks, const OutputFactors& factors, Sums* sums,
                int32_t* columns) {
  const int64_t words = word_count(w.k), first = tile * kTileRows, left = w.n - first;
  const int64_t outputs = left < kTileRows ? left : kTileRows;
  const auto* value = static_cast<const uint8_t*>(w.value);
  const int32_t* next_mask = w.mask + (tile + 1) * words * kTileRows;
  int64_t entry[kTileRows];
  for (int64_t lane = 0; lane < outputs; ++lane) entry[lane] = w.start[first + lane];
  uint8_t last_codes[kBitmapColumns + 4 * kTileRows];  // of outputs whose last four would reach past the array
  Chunk chunk{{}, 1, 4, true, false};
  for (int64_t word = 0; !chunk.ends; word += kBitmapColumns / 32, chunk.begins = false) {
    const int64_t end = word + kBitmapColumns / 32 < words ? word + kBitmapColumns / 32 : words;
    chunk.ends = end == words;
    int32_t* column = columns;
    uint8_t* last = last_codes;
    for (int64_t lane = 0; lane < outputs; ++lane) {
      int64_t count = columns_of_words(w, tile, lane, word, end, column);
      const int64_t left = w.start[first + lane + 1] - entry[lane];
      if (count > left) count = left;  // contradictory arrays
      const int64_t fours = ceil_div(count, 4);
      _mm512_storeu_si512(column + count, _mm512_set1_epi32(static_cast<int>(w.k)));  // what the last four lacks
      chunk.of_output[lane] = {column, value + entry[lane], fours};
      if (entry[lane] + 4 * fours > w.entries) {
        __builtin_memcpy(last, value + entry[lane], static_cast<size_t>(count));
        chunk.of_output[lane].code = last;
        last += 4 * fours;
      }
      for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(value + entry[lane] + i + 2048);
      for (int64_t i = word + lane; i < end; i += kTileRows) __builtin_prefetch(next_mask + i * kTileRows);
      column += 4 * fours;
      entry[lane] += count;
    }
    add_chunk(chunk, blocks, factors, sums);
  }
}

// `count` rows of bytes to [width + 1][64]; rows that are missing, and the last column, are 0. The order of the rows is
// the one that the interleaving of 4 columns undoes.
void transpose_rows(const int8_t* q, int64_t width, int64_t count, int8_t* out) {
  for (int64_t column = 0; column < width; column += 16) {
    const __mmask16 bytes = first_lanes(width - column);
    for (int64_t part = 0; part < 4; ++part) {
      __m128i z[16], y[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t row = 16 * (i / 4) + 4 * part + i % 4;
        z[i] = row < count ? _mm_maskz_loadu_epi8(bytes, q + row * width + column) : _mm_setzero_si128();
      }
#pragma GCC unroll 4
      for (int round = 0; round < 4; ++round) {  // a perfect shuffle of 16 rows of 16 bytes, 4 times: a transposition
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          y[2 * i] = _mm_unpacklo_epi8(z[i], z[i + 8]);
          y[2 * i + 1] = _mm_unpackhi_epi8(z[i], z[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) z[i] = y[i];
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        if (column + i < width) {
          _mm_store_si128(reinterpret_cast<__m128i*>(out + (column + i) * kBlockRows + 16 * part), z[i]);
        }
      }
    }
  }
  for (int64_t i = 0; i < kBlockRows; ++i) out[width * kBlockRows + i] = 0;
}

// A block's sums to results. `totals`: of the block's rows.
[[gnu::noinline]] void finish_block(const SalientTask& task, int64_t row, int64_t count, int64_t tile, const Sums& sums,
                                    const OutputFactors& factors, const float* totals) {
  for (int64_t first = 0; first < count; first += 16) {
    const __mmask16 rows = first_lanes(count - first);
    const __m512 total = _mm512_maskz_loadu_ps(rows, totals + first);
    const __m512 row_scale = _mm512_maskz_loadu_ps(rows, task.row_scale + row + first);
    __m512 value[kTileRows];
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      const __m512 sum = _mm512_load_ps(sums.value[lane] + first);
      value[lane] = _mm512_mul_ps(_mm512_fmadd_ps(_mm512_set1_ps(factors.mu[lane]), total, sum), row_scale);
    }
    transpose16(value);
    float* out = task.at(row + first, tile);
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; ++r) {
      if (r < count - first) _mm512_storeu_ps(out + r * kTileRows, value[r]);
    }
  }
}

}  // namespace

void salient_many_rows_avx512vnni(const SalientInt8Rows& rows, int64_t begin, int64_t end, TileFactors factors) {
  const SalientTask& task = rows.task;
  const SalientWeight& w = task.weight;
  const bool columns = w.encoding == SalientEncoding::columns;
  const int64_t size = (rows.width + 1) * kBlockRows, all = ceil_div(task.m, kBlockRows);
  const int64_t together = blocks_together(size) < all ? blocks_together(size) : all;
  const Scratch<int8_t> q(together * size);
  const Scratch<int32_t> every(columns ? rows.width : 0);
  for (int64_t i = 0; columns && i < rows.width; ++i) every[i] = static_cast<int32_t>(i);
  const Scratch<int32_t> bits(w.encoding == SalientEncoding::bitmap ? kTileRows * kBitmapColumns + 64 : 0);
  const Scratch<float> totals(task.m);
  for (int64_t i = 0; i < task.m; ++i) totals[i] = static_cast<float>(task.total[i]);
  const Scratch<Sums> sums(together);
  for (int64_t row = 0; row < task.m; row += together * kBlockRows) {
    const int64_t left = task.m - row, most = together * kBlockRows, count = left < most ? left : most;
    const Blocks blocks{q, size, ceil_div(count, kBlockRows)};
    const auto rows_of = [&](int64_t i) {
      const int64_t rest = count - i * kBlockRows;
      return rest < kBlockRows ? rest : kBlockRows;
    };
    for (int64_t i = 0; i < blocks.count; ++i) {
      transpose_rows(rows.q + (row + i * kBlockRows) * rows.width, rows.width, rows_of(i), q + i * size);
    }
    for (int64_t tile = begin; tile < end; ++tile) {
      factors.load(task, tile);
      const OutputFactors of_outputs(factors);
      if (columns) {
        add_columns(rows, tile, blocks, of_outputs, every, sums);
      } else {
        w.encoding == SalientEncoding::list ? add_list(w, tile, blocks, of_outputs, sums)
                                            : add_bitmap(w, tile, blocks, of_outputs, sums, bits);
      }
      for (int64_t i = 0; i < blocks.count; ++i) {
        const int64_t first = row + i * kBlockRows;
        finish_block(task, first, rows_of(i), tile, sums[i], of_outputs, totals + first);
      }
    }
  }
}

}  // namespace bitmill::detail
