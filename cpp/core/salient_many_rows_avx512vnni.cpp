// SPDX-License-Identifier: Apache-2.0
// The salient part with int8 activations for many rows. They are transposed to [column][64] bytes, and 4 salient
// weights are one vpdpbusd for 16 of them.
#include "salient_int8_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kBlockRows = 64;   // rows transposed together
constexpr int64_t kChunkSteps = 64;  // steps of a list that are decoded together

// Sums of a tile for 64 rows of activations.
struct Sums {
  alignas(64) int32_t code[kTileRows][kBlockRows], plain[kTileRows][kBlockRows];
};

// Rows of activations, 64 at a time: `count` blocks of `size` = (width + 1) x 64 bytes, columns first. The last column
// is 0.
struct Blocks {
  const int8_t* q;
  int64_t size, count;
  const float* next;  // where the sign plane's part of the next tile begins, [rows][n]
  int64_t rows, n;

  // Those lines, far apart, arrive while this tile is computed: a part for each of its 16 outputs.
  void prefetch_next(int64_t lane) const {
    for (int64_t row = lane * rows / kTileRows; row < (lane + 1) * rows / kTileRows; ++row) {
      __builtin_prefetch(next + row * n, 1);
    }
  }
};

// Adds 4 x `fours` entries to the sums of one output, which begin there or go on. Columns lie `stride` apart, their
// codes in words that lie `word_stride` apart. q: a block.
void add_entries(const int32_t* column, int64_t stride, const int32_t* codes, int64_t word_stride, int64_t fours,
                 const int8_t* q, bool begins, int32_t* code, int32_t* plain) {
  const auto before = [begins](const int32_t* sums) {
    return begins ? _mm512_setzero_si512() : _mm512_load_si512(sums);
  };
  __m512i c0 = before(code), c1 = before(code + 16), c2 = before(code + 32), c3 = before(code + 48);
  __m512i t0 = before(plain), t1 = before(plain + 16), t2 = before(plain + 32), t3 = before(plain + 48);
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < fours; ++i, column += 4 * stride) {
    const auto load = [&](int64_t j) { return _mm512_load_si512(q + int64_t{column[j * stride]} * kBlockRows); };
    const __m512i a = load(0), b = load(1), c = load(2), d = load(3);
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    const __m512i p0 = _mm512_unpacklo_epi16(ab_low, cd_low), p1 = _mm512_unpackhi_epi16(ab_low, cd_low);
    const __m512i p2 = _mm512_unpacklo_epi16(ab_high, cd_high), p3 = _mm512_unpackhi_epi16(ab_high, cd_high);
    const __m512i v = _mm512_set1_epi32(codes[i * word_stride]);
    c0 = _mm512_dpbusd_epi32(c0, v, p0), t0 = _mm512_dpbusd_epi32(t0, ones, p0);
    c1 = _mm512_dpbusd_epi32(c1, v, p1), t1 = _mm512_dpbusd_epi32(t1, ones, p1);
    c2 = _mm512_dpbusd_epi32(c2, v, p2), t2 = _mm512_dpbusd_epi32(t2, ones, p2);
    c3 = _mm512_dpbusd_epi32(c3, v, p3), t3 = _mm512_dpbusd_epi32(t3, ones, p3);
  }
  _mm512_store_si512(code, c0), _mm512_store_si512(code + 16, c1);
  _mm512_store_si512(code + 32, c2), _mm512_store_si512(code + 48, c3);
  _mm512_store_si512(plain, t0), _mm512_store_si512(plain + 16, t1);
  _mm512_store_si512(plain + 32, t2), _mm512_store_si512(plain + 48, t3);
}

void add_entries(const int32_t* column, int64_t stride, const int32_t* codes, int64_t word_stride, int64_t fours,
                 const Blocks& blocks, int64_t lane, bool begins, Sums* sums) {
  blocks.prefetch_next(lane);
  for (int64_t i = 0; i < blocks.count; ++i) {
    add_entries(column, stride, codes, word_stride, fours, blocks.q + i * blocks.size, begins, sums[i].code[lane],
                sums[i].plain[lane]);
  }
}

void add_list(const SalientWeight& w, int64_t tile, const Blocks& blocks, Sums* sums) {
  const __m256i last = _mm256_set1_epi16(static_cast<int16_t>(w.k - 1));
  const __m512i zeros = _mm512_set1_epi32(static_cast<int>(w.k));  // the row of zeros after the last column
  __m256i column = _mm256_set1_epi16(-1);
  alignas(64) int32_t columns[kChunkSteps][kTileRows], codes[kChunkSteps / 4][kTileRows];
  int64_t step = w.start[tile];
  bool begins = true;
  do {
    int64_t fours = 0;
    for (; fours < kChunkSteps / 4 && step < w.start[tile + 1]; ++fours) {
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
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      add_entries(columns[0] + lane, kTileRows, codes[0] + lane, kTileRows, fours, blocks, lane, begins, sums);
    }
    begins = false;
  } while (step < w.start[tile + 1]);
}

// `every`: 0, 1, 2, ... up to the width.
void add_columns(const SalientInt8Rows& rows, int64_t tile, const Blocks& blocks, const int32_t* every, Sums* sums) {
  const int64_t words = rows.width / 4;
  const int32_t* value = static_cast<const int32_t*>(rows.task.weight.value) + tile * words * kTileRows;
  for (int64_t lane = 0; lane < kTileRows; ++lane) {
    add_entries(every, 1, value + lane, kTileRows, words, blocks, lane, true, sums);
  }
}

void add_bitmap(const SalientWeight& w, int64_t tile, const Blocks& blocks, Sums* sums) {
  const int64_t words = word_count(w.k);
  alignas(64) int32_t column[kSegmentColumns + 64], codes[kSegmentColumns / 4];
  for (int64_t lane = 0; lane < kTileRows && tile * kTileRows + lane < w.n; ++lane) {
    const int64_t row = tile * kTileRows + lane;
    int64_t entry = w.start[row];
    int64_t word = 0;
    do {
      const int64_t end = word + kSegmentWords < words ? word + kSegmentWords : words;
      int64_t count = columns_of_words(w, tile, lane, word, end, column);
      if (count > w.start[row + 1] - entry) count = w.start[row + 1] - entry;  // contradictory arrays
      const int64_t fours = ceil_div(count, 4);
      for (int64_t i = count; i < 4 * fours; ++i) column[i] = static_cast<int32_t>(w.k);
      const uint8_t* value = static_cast<const uint8_t*>(w.value) + entry;
      for (int64_t i = 0; i < count; i += 64) {
        const __mmask64 here = count - i < 64 ? (__mmask64{1} << (count - i)) - 1 : ~__mmask64{0};
        _mm512_store_si512(codes + i / 4, _mm512_maskz_loadu_epi8(here, value + i));
      }
      add_entries(column, 1, codes, 1, fours, blocks, lane, word == 0, sums);
      entry += count;
      word = end;
    } while (word < words);
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

// A block's sums, from integers to results. `totals`: of the block's rows.
void finish_block(const SalientTask& task, int64_t row, int64_t count, int64_t tile, const Sums& sums,
                  const TileFactors& factors, const float* totals) {
  alignas(64) float scale[kTileRows], zero[kTileRows], sum[kTileRows * 16];
  _mm512_store_ps(scale, factors.scale);
  _mm512_store_ps(zero, factors.zero);
  for (int64_t first = 0; first < count; first += 16) {
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      const __m512 c = _mm512_cvtepi32_ps(_mm512_load_si512(sums.code[lane] + first));
      const __m512 t = _mm512_cvtepi32_ps(_mm512_load_si512(sums.plain[lane] + first));
      const __m512 value =
          _mm512_mul_ps(_mm512_set1_ps(scale[lane]), _mm512_fnmadd_ps(_mm512_set1_ps(zero[lane]), t, c));
      _mm512_store_ps(sum + lane * 16, _mm512_fnmadd_ps(_mm512_set1_ps(factors.base[lane]), t, value));
    }
    const int64_t here = count - first < 16 ? count - first : 16;
    finish_rows(task, row + first, here, tile, sum, 16, factors, totals + first);
  }
}

}  // namespace

void salient_many_rows_avx512vnni(const SalientInt8Rows& rows, int64_t begin, int64_t end, TileFactors factors) {
  const SalientTask& task = rows.task;
  const SalientWeight& w = task.weight;
  const bool columns = w.encoding == SalientEncoding::columns;
  const int64_t size = (rows.width + 1) * kBlockRows, all = ceil_div(task.m, kBlockRows);
  const int64_t together = blocks_together(size) < all ? blocks_together(size) : all;
  Scratch<int8_t> q(together * size, 0);
  Scratch<int32_t> every(columns ? rows.width : 0, 0);
  for (int64_t i = 0; columns && i < rows.width; ++i) every[i] = static_cast<int32_t>(i);
  Scratch<float> totals(task.m, 0);
  for (int64_t i = 0; i < task.m; ++i) totals[i] = static_cast<float>(task.total[i]);
  Scratch<Sums> sums(together, {});
  for (int64_t row = 0; row < task.m; row += together * kBlockRows) {
    const int64_t left = task.m - row, most = together * kBlockRows, count = left < most ? left : most;
    Blocks blocks{q, size, ceil_div(count, kBlockRows), nullptr, count, w.n};
    const auto rows_of = [&](int64_t i) {
      const int64_t rest = count - i * kBlockRows;
      return rest < kBlockRows ? rest : kBlockRows;
    };
    for (int64_t i = 0; i < blocks.count; ++i) {
      transpose_rows(rows.q + (row + i * kBlockRows) * rows.width, rows.width, rows_of(i), q + i * size);
    }
    for (int64_t tile = begin; tile < end; ++tile) {
      factors.load(task, tile);
      blocks.next = task.signs + row * w.n + (tile + 1) * kTileRows;
      if (columns) {
        add_columns(rows, tile, blocks, every, sums);
      } else {
        w.encoding == SalientEncoding::list ? add_list(w, tile, blocks, sums) : add_bitmap(w, tile, blocks, sums);
      }
      for (int64_t i = 0; i < blocks.count; ++i) {
        const int64_t first = row + i * kBlockRows;
        finish_block(task, first, rows_of(i), tile, sums[i], factors, totals + first);
      }
    }
  }
}

}  // namespace bitmill::detail
