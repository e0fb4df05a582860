// SPDX-License-Identifier: Apache-2.0
// The salient part with int8 activations, uint8 codes and one group: exact integers C = sum of code x q and T = sum of
// q over the salient weights of an output, which give scale (C - zero T) - (mu - alpha) T. A few rows walk a tile as it
// is stored.
#include "salient_int8_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kFewRows = 8, kFewRowsOfBitmap = 10;  // from so many rows on they are transposed

struct Integers {
  __m512i code, plain;  // C and T of 16 outputs
};

__m512 to_sum(Integers sums, const TileFactors& factors) {
  const __m512 c = _mm512_cvtepi32_ps(sums.code), t = _mm512_cvtepi32_ps(sums.plain);
  const __m512 value = _mm512_mul_ps(factors.scale, _mm512_fnmadd_ps(factors.zero, t, c));
  return _mm512_fnmadd_ps(_mm512_loadu_ps(factors.base), t, value);
}

// `x`: the row as floats, in which sums of up to kExactSteps products are exact integers.
constexpr int64_t kExactSteps = 512;  // 512 x 255 x 127 < 2^24

Integers list_single(const SalientWeight& w, int64_t tile, const float* x) {
  const __m256i last = _mm256_set1_epi16(static_cast<int16_t>(w.k - 1));
  __m256i column = _mm256_set1_epi16(-1);
  Integers sums{_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t step = w.start[tile]; step < w.start[tile + 1];) {
    const int64_t pause = step + kExactSteps < w.start[tile + 1] ? step + kExactSteps : w.start[tile + 1];
    __m512 code_sum = _mm512_setzero_ps(), plain_sum = code_sum;
    for (; step < pause; ++step) {
      const auto* gap = reinterpret_cast<const __m128i*>(w.gap) + step;
      const auto* value = static_cast<const __m128i*>(w.value) + step;
      prefetch(gap);
      prefetch(value);
      const __m128i gaps = _mm_loadu_si128(gap);
      const __mmask16 entries = _mm_cmpneq_epu8_mask(gaps, _mm_set1_epi8(static_cast<char>(kNoEntry)));
      column = next_columns(column, gaps, entries);
      const __m512 q = fetch16(x, _mm256_min_epu16(column, last));
      const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(value)));
      code_sum = _mm512_mask3_fmadd_ps(q, code, code_sum, entries);
      plain_sum = _mm512_mask_add_ps(plain_sum, entries, plain_sum, q);
    }
    sums.code = _mm512_add_epi32(sums.code, _mm512_cvtps_epi32(code_sum));
    sums.plain = _mm512_add_epi32(sums.plain, _mm512_cvtps_epi32(plain_sum));
  }
  return sums;
}

Integers columns_single(const SalientInt8Rows& rows, int64_t tile, const int8_t* q, int32_t total) {
  const int64_t words = rows.width / 4;
  const int32_t* value = static_cast<const int32_t*>(rows.task.weight.value) + tile * words * kTileRows;
  __m512i even = _mm512_setzero_si512(), odd = even;
  const auto four = [&](int64_t word) {
    int32_t bytes;
    __builtin_memcpy(&bytes, q + 4 * word, 4);
    return _mm512_set1_epi32(bytes);
  };
  int64_t word = 0;
  for (; word + 2 <= words; word += 2) {
    prefetch(value + word * kTileRows);
    prefetch(value + (word + 1) * kTileRows);
    even = _mm512_dpbusd_epi32(even, _mm512_loadu_si512(value + word * kTileRows), four(word));
    odd = _mm512_dpbusd_epi32(odd, _mm512_loadu_si512(value + (word + 1) * kTileRows), four(word + 1));
  }
  if (word < words) even = _mm512_dpbusd_epi32(even, _mm512_loadu_si512(value + word * kTileRows), four(word));
  return {_mm512_add_epi32(even, odd), _mm512_set1_epi32(total)};
}

// The codes from `entry` on, one for each bit of a mask, at the places of the bits. Unless `whole`, the array may end
// before 64 more.
template <bool whole>
__m512i spread_codes(const SalientWeight& w, int64_t entry, uint64_t mask) {
  const auto* value = static_cast<const uint8_t*>(w.value) + entry;
  __m512i codes;
  if constexpr (whole) {
    codes = _mm512_loadu_si512(value);
  } else {
    const int64_t left = w.entries - entry;
    codes = _mm512_maskz_loadu_epi8(left >= 64 ? ~__mmask64{0} : left > 0 ? (__mmask64{1} << left) - 1 : 0, value);
  }
  asm("" : "+v"(codes));  // an expansion from memory is many times slower
  return _mm512_mask_expand_epi8(fresh_zeros(), mask, codes);
}

// Sums of some outputs, one after another, for some rows of activations.
// mask: [outputs][stride], 64 columns each. entry: [outputs], where their codes begin. q: [rows][64 steps].
// sums: [rows][16 outputs][C, T], from the first of the outputs on.
template <int outputs, int rows, bool whole>
void add_outputs(const SalientWeight& w, const int32_t* entry, const uint64_t* mask, int64_t stride, int64_t steps,
                 const int8_t* q, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i c[outputs][rows], t[outputs][rows];
  int64_t at[outputs];
#pragma GCC unroll 4
  for (int o = 0; o < outputs; ++o) {
    at[o] = entry[o];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) c[o][r] = t[o][r] = _mm512_setzero_si512();
  }
  for (int64_t step = 0; step < steps; ++step) {
    __m512i activations[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      activations[r] = _mm512_load_si512(q + 64 * (r * steps + step));
      asm("" : "+v"(activations[r]));  // one load for all outputs
    }
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) {
      const uint64_t bits = mask[o * stride + step];
      const __m512i codes = spread_codes<whole>(w, at[o], bits);
      const __m512i salient = _mm512_maskz_mov_epi8(bits, ones);
      at[o] += __builtin_popcountll(bits);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        c[o][r] = _mm512_dpbusd_epi32(c[o][r], codes, activations[r]);
        t[o][r] = _mm512_dpbusd_epi32(t[o][r], salient, activations[r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const __m512i low = _mm512_unpacklo_epi32(c[o][r], t[o][r]), high = _mm512_unpackhi_epi32(c[o][r], t[o][r]);
      const __m512i eight = _mm512_add_epi32(low, high);
      const __m256i four = _mm256_add_epi32(_mm512_castsi512_si256(eight), _mm512_extracti64x4_epi64(eight, 1));
      const __m128i two = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
      const __m128i pair = _mm_add_epi32(two, _mm_unpackhi_epi64(two, two));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(sums + 2 * (r * kTileRows + o)), pair);
    }
  }
}

// The masks of a tile, output by output: [16][stride], 64 columns each, and zeros up to the stride, a multiple of 8.
void masks_of_outputs(const SalientWeight& w, int64_t tile, int64_t stride, uint64_t* out) {
  const int64_t words = word_count(w.k);
  const auto* mask = reinterpret_cast<const float*>(w.mask + tile * words * kTileRows);
  auto* half = reinterpret_cast<float*>(out);
  for (int64_t word = 0; word < words; word += 16) {
    const float* rows = mask + word * kTileRows;
    alignas(64) float last[16 * kTileRows];
    if (word + 16 > words) {
      for (int64_t i = 0; i < 16; ++i) {
        const bool there = word + i < words;
        _mm512_store_ps(last + i * kTileRows, there ? _mm512_loadu_ps(rows + i * kTileRows) : _mm512_setzero_ps());
      }
      rows = last;
    }
    transpose16(rows, kTileRows, half + word, 2 * stride);
  }
}

// A tile for some rows of activations. q: [rows][64 steps] with zeros up to the end, which is why mask bits past k do
// not matter. masks: room for [16][8 ceil(steps / 8)].
template <int rows>
void bitmap_tile(const SalientWeight& w, int64_t tile, const int8_t* q, int64_t steps, uint64_t* masks,
                 Integers* sums) {
  constexpr int outputs = rows == 1 ? 2 : 1;  // together: a single sum would wait for itself
  const int64_t words = word_count(w.k), last = tile_count(w.n) - 1, stride = ceil_div(steps, 8) * 8;
  const int32_t* next_mask = w.mask + (tile < last ? tile + 1 : tile) * words * kTileRows;
  masks_of_outputs(w, tile, stride, masks);
  const int64_t count = w.n - tile * kTileRows < kTileRows ? w.n - tile * kTileRows : kTileRows;
  const int32_t* entry = w.start + tile * kTileRows;
  alignas(64) int32_t pairs[rows * 2 * kTileRows] = {};
  for (int64_t lane = 0; lane < count; lane += outputs) {
    const bool alone = lane + outputs > count;
    const int64_t next = alone ? count : lane + outputs;
    for (int64_t word = lane / outputs; word < words; word += kTileRows / outputs) {
      prefetch(next_mask + word * kTileRows);
    }
    for (int64_t i = entry[lane]; i < entry[next]; i += 64) prefetch(static_cast<const uint8_t*>(w.value) + i);
    const bool whole = entry[next - 1] + 64 * (steps + 1) <= w.entries;
    const uint64_t* mask = masks + lane * stride;
    int32_t* to = pairs + 2 * lane;
    if (alone) {
      add_outputs<1, rows, false>(w, entry + lane, mask, stride, steps, q, to);
    } else if (whole) {
      add_outputs<outputs, rows, true>(w, entry + lane, mask, stride, steps, q, to);
    } else {
      add_outputs<outputs, rows, false>(w, entry + lane, mask, stride, steps, q, to);
    }
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int r = 0; r < rows; ++r) {
    const int32_t* from = pairs + r * 2 * kTileRows;
    const __m512i low = _mm512_load_si512(from), high = _mm512_load_si512(from + kTileRows);
    sums[r] = {_mm512_permutex2var_epi32(low, even, high), _mm512_permutex2var_epi32(low, odd, high)};
  }
}

// A bitmap, some rows of activations at a time: what a word costs is shared by them.
void multiply_few_by_bitmap(const SalientInt8Rows& rows, int64_t begin, int64_t end, TileFactors& factors) {
  const SalientTask& task = rows.task;
  const SalientWeight& w = task.weight;
  constexpr int64_t kTogether = 4;
  const int64_t steps = ceil_div(rows.width, 64), width = 64 * steps;
  Scratch<int8_t> q((task.m < kTogether ? task.m : kTogether) * width, 0);
  Scratch<uint64_t> masks(kTileRows * ceil_div(steps, 8) * 8, 0);
  for (int64_t row = 0; row < task.m;) {
    const int64_t left = task.m - row, count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < rows.width; ++i) q[r * width + i] = rows.q[(row + r) * rows.width + i];
      for (int64_t i = rows.width; i < width; ++i) q[r * width + i] = 0;
    }
    auto* multiply = count == 4 ? bitmap_tile<4> : count == 2 ? bitmap_tile<2> : bitmap_tile<1>;
    for (int64_t tile = begin; tile < end; ++tile) {
      factors.load(task, tile);
      Integers sums[kTogether];
      multiply(w, tile, q, steps, masks, sums);
      for (int64_t r = 0; r < count; ++r) {
        const float all = static_cast<float>(task.total[row + r]);
        finish(task, row + r, tile, to_sum(sums[r], factors), factors, &all);
      }
    }
    row += count;
  }
}

void multiply_few(const SalientInt8Rows& rows, int64_t begin, int64_t end, TileFactors& factors) {
  const SalientTask& task = rows.task;
  const SalientWeight& w = task.weight;
  Scratch<float> wide(rows.width, 0);
  for (int64_t row = 0; row < task.m; ++row) {
    const int8_t* q = rows.q + row * rows.width;
    int32_t total = 0;
    for (int64_t i = 0; i < rows.width; ++i) total += q[i], wide[i] = static_cast<float>(q[i]);
    const float all = static_cast<float>(task.total[row]);
    for (int64_t tile = begin; tile < end; ++tile) {
      factors.load(task, tile);
      const Integers sums =
          w.encoding == SalientEncoding::list ? list_single(w, tile, wide) : columns_single(rows, tile, q, total);
      finish(task, row, tile, to_sum(sums, factors), factors, &all);
    }
  }
}

}  // namespace

void salient_tiles_avx512vnni(const SalientTask& task, int64_t begin, int64_t end) {
  const SalientWeight& w = task.weight;
  const bool columns = w.encoding == SalientEncoding::columns;
  const int64_t width = columns ? ceil_div(w.entries, 4) * 4 : w.k;
  Scratch<int8_t> chosen(columns ? task.m * width : 0, 0);
  for (int64_t row = 0; columns && row < task.m; ++row) {
    for (int64_t j = 0; j < w.entries; ++j) chosen[row * width + j] = task.q[row * w.k + w.column[j]];
  }
  float factor[2 * kTileRows];
  TileFactors factors{{}, {}, factor, w.mu ? factor + kTileRows : nullptr};
  const SalientInt8Rows rows{task, width, columns ? chosen : task.q};
  const bool bitmap = w.encoding == SalientEncoding::bitmap;
  if (task.m >= (bitmap ? kFewRowsOfBitmap : kFewRows)) {
    salient_many_rows_avx512vnni(rows, begin, end, factors);
  } else {
    bitmap ? multiply_few_by_bitmap(rows, begin, end, factors) : multiply_few(rows, begin, end, factors);
  }
}

}  // namespace bitmill::detail
