// SPDX-License-Identifier: Apache-2.0
// The salient part with float activations, row by row: a row walks a tile as it is stored. A list and columns have a
// lane for each of the tile's 16 outputs; a bitmap goes output by output.
#include "salient_floats_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kFewRows = 4;  // from so many rows on they are transposed

template <bool codes, bool grouped>
__m512 list_single(const SalientTask& task, int64_t tile, const float* x, const TileFactors& factors) {
  const __m256i last = _mm256_set1_epi16(static_cast<int16_t>(task.weight.k - 1));
  ListStep<codes, grouped> s;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t step = task.weight.start[tile]; step < task.weight.start[tile + 1]; ++step) {
    s.take(task, factors, step, last);
    sum = _mm512_mask3_fmadd_ps(fetch16(x, s.column), s.difference, sum, s.entries);
  }
  return sum;
}

template <bool codes>
__m512 columns_single(const SalientRows& rows, int64_t tile, const float* x, const TileFactors& factors) {
  const int32_t* values = values_of_tile<codes>(rows.task.weight, tile);
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int64_t j = 0; j < rows.width; ++j) {
    if (j % 4 == 0) {
      const int32_t* ahead = values + j / (codes ? 4 : 2) * kTileRows;
      prefetch(ahead);
      if (!codes) prefetch(ahead + kTileRows);
    }
    sum = _mm512_fmadd_ps(_mm512_set1_ps(x[j]), column_difference<codes>(rows, values, j, factors), sum);
  }
  return sum;
}

struct Spread {
  __m512 low, high;
};

// The values from `entry` on, one for each set bit, at the places of the bits; 0 elsewhere. Codes without their zero.
template <bool codes>
Spread spread(const SalientWeight& w, int64_t entry, uint32_t bits) {
  const int64_t left = w.entries - entry;
  const auto first = [left](int64_t size) { return left > 0 ? (uint64_t{1} << (left < size ? left : size)) - 1 : 0; };
  if constexpr (codes) {
    const uint8_t* value = static_cast<const uint8_t*>(w.value) + entry;
    __m256i bytes = left >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value))
                               : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(first(32)), value);
    asm("" : "+v"(bytes));  // an expansion from memory is many times slower
    prefetch(value);
    const __m256i apart = _mm256_mask_expand_epi8(_mm512_castsi512_si256(fresh_zeros()), bits, bytes);
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(apart))),
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(apart, 1)))};
  }
  const uint16_t* value = static_cast<const uint16_t*>(w.value) + entry;
  __m512i halves =
      left >= 32 ? _mm512_loadu_si512(value) : _mm512_maskz_loadu_epi16(static_cast<__mmask32>(first(32)), value);
  asm("" : "+v"(halves));
  prefetch(value);
  const __m512i apart = _mm512_mask_expand_epi16(fresh_zeros(), bits, halves);
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(apart)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(apart, 1))};
}

// Row by row: the values of a word's 32 columns move apart to where their activations are. x: with zeros up to a
// multiple of 32, which is why bits past k do not matter.
template <bool codes>
__m512 bitmap_single(const SalientTask& task, int64_t tile, const float* x, const TileFactors& factors) {
  const SalientWeight& w = task.weight;
  const int64_t words = word_count(w.k), group_words = ceil_div(task.group_width, 32);
  const int32_t* mask = w.mask + tile * words * kTileRows;
  const int32_t* next_mask = tile + 1 < tile_count(w.n) ? mask + words * kTileRows : mask;
  alignas(64) float value[kTileRows] = {}, from_signs[kTileRows] = {};
  for (int64_t lane = 0; lane < kTileRows && tile * kTileRows + lane < w.n; ++lane) {
    for (int64_t word = lane; word < words; word += kTileRows) prefetch(next_mask + word * kTileRows);
    const int64_t row = tile * kTileRows + lane;
    int64_t entry = w.start[row];
    __m512 even = _mm512_setzero_ps(), odd = even, all = even;
    for (int64_t group = 0; group < task.groups; ++group) {
      const int64_t last = (group + 1) * group_words, end = last < words ? last : words;
      __m512 total = _mm512_setzero_ps();
      for (int64_t word = group * group_words; word < end; ++word) {
        const uint32_t bits = static_cast<uint32_t>(mask[word * kTileRows + lane]);
        const __m512 a = _mm512_loadu_ps(x + 32 * word), b = _mm512_loadu_ps(x + 32 * word + 16);
        const Spread v = spread<codes>(w, entry, bits);
        even = _mm512_fmadd_ps(a, v.low, even);
        odd = _mm512_fmadd_ps(b, v.high, odd);
        total = _mm512_mask_add_ps(total, static_cast<__mmask16>(bits), total, a);
        total = _mm512_mask_add_ps(total, static_cast<__mmask16>(bits >> 16), total, b);
        entry += __builtin_popcount(bits);
      }
      all = _mm512_add_ps(all, total);
      from_signs[lane] += factors.base[group * kTileRows + lane] * _mm512_reduce_add_ps(total);
    }
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    value[lane] = codes ? w.value_scale[row] * (sum - w.value_zero[row] * _mm512_reduce_add_ps(all)) : sum;
  }
  return _mm512_sub_ps(_mm512_load_ps(value), _mm512_load_ps(from_signs));
}

template <bool codes>
__m512 single(const SalientRows& rows, int64_t tile, const float* x, const TileFactors& factors) {
  const SalientTask& task = rows.task;
  switch (task.weight.encoding) {
    case SalientEncoding::list:
      if (task.groups == 1) return list_single<codes, false>(task, tile, x, factors);
      return list_single<codes, true>(task, tile, x, factors);
    case SalientEncoding::columns:
      return columns_single<codes>(rows, tile, x, factors);
    default:
      return bitmap_single<codes>(task, tile, x, factors);
  }
}

template <bool codes>
void multiply(const SalientRows& rows, int64_t begin, int64_t end, TileFactors& factors) {
  const SalientTask& task = rows.task;
  Scratch<float> x(ceil_div(rows.width, 32) * 32, 0);
  for (int64_t row = 0; row < task.m; ++row) {
    for (int64_t i = 0; i < rows.width; ++i) x[i] = rows.x[row * rows.width + i];
    for (int64_t tile = begin; tile < end; ++tile) {
      factors.load(task, tile);
      const __m512 sum = single<codes>(rows, tile, x, factors);
      finish(task, row, tile, sum, factors, rows.totals + row * task.groups);
    }
  }
}

void row_totals(const SalientTask& task, float* totals) {
  const int64_t k = task.weight.k;
  for (int64_t row = 0; row < task.m; ++row) {
    for (int64_t group = 0; group < task.groups; ++group) {
      const int64_t last = (group + 1) * task.group_width, end = last < k ? last : k;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t c = group * task.group_width; c < end; c += 16) {
        sum = _mm512_add_ps(sum, load16(task.x + row * k + c, first_lanes(end - c)));
      }
      totals[row * task.groups + group] = _mm512_reduce_add_ps(sum);
    }
  }
}

}  // namespace

void salient_tiles_avx512(const SalientTask& task, int64_t begin, int64_t end) {
  const SalientWeight& w = task.weight;
  const bool columns = w.encoding == SalientEncoding::columns;
  const int64_t width = columns ? w.entries : w.k;
  Scratch<float> totals(task.m * task.groups, 0);
  Scratch<float> chosen(columns ? task.m * width : 0, 0);
  Scratch<int32_t> base_of(columns ? width : 0, 0);
  Scratch<float> factor(2 * task.groups * kTileRows, 0);
  if (w.mu) row_totals(task, totals);
  for (int64_t j = 0; columns && j < width; ++j) {
    base_of[j] = static_cast<int32_t>(w.column[j] / task.group_width * kTileRows);
    for (int64_t row = 0; row < task.m; ++row) chosen[row * width + j] = task.x[row * w.k + w.column[j]];
  }
  TileFactors factors{{}, {}, factor, w.mu ? factor + task.groups * kTileRows : nullptr};
  const SalientRows rows{task, width, columns ? chosen : task.x, totals, base_of};
  if (task.m >= kFewRows) {
    salient_many_rows_avx512(rows, begin, end, factors);
  } else {
    w.value_scale ? multiply<true>(rows, begin, end, factors) : multiply<false>(rows, begin, end, factors);
  }
}

void widen_avx512(Dtype dtype, const void* x, int64_t count, float* out) {
  with_dtype(dtype, x, [&](const auto* values) {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 lanes = first_lanes(count - i);
      _mm512_mask_storeu_ps(out + i, lanes, load16(values + i, lanes));
    }
  });
}

}  // namespace bitmill::detail
