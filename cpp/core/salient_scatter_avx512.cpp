// SPDX-License-Identifier: Apache-2.0
// The salient part with float activations. A single row walks a tile as it is stored, a lane for each of its 16
// outputs. Many rows are transposed to [column][32]: a salient weight is then one multiplication of a number with 2
// vectors of rows, so the work falls with the number of salient weights.
#include "salient_scatter_avx512.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kFewRows = 4;      // from so many rows on they are transposed
constexpr int64_t kBlockRows = 32;   // rows transposed together
constexpr int64_t kChunkSteps = 64;  // steps of a list, or columns, that are decoded together

struct Rows {
  const SalientTask& task;
  int64_t width;           // of a row that is multiplied: k, or the number of salient columns
  const float* x;          // [m, width]
  const float* totals;     // [m, groups]: X_g
  const int32_t* base_of;  // salient columns: where the base of a column lies in TileFactors
};

// The 16 values beginning with element i as floats, less the zero of their codes.
__m512 load_codes(const SalientWeight& w, int64_t i, const TileFactors& factors) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(w.value) + i));
  return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), factors.zero);
}

// What is missing at a salient weight after the sign plane: value - (mu - alpha).
template <bool codes>
__m512 difference(__m512 value, __m512 base, const TileFactors& factors) {
  return codes ? _mm512_fmsub_ps(value, factors.scale, base) : _mm512_sub_ps(value, base);
}

// The base of each lane's column: one for the row, or that of the column's group.
template <bool grouped>
__m512 base_of(const SalientTask& task, const TileFactors& factors, __m512i column) {
  if constexpr (!grouped) return _mm512_loadu_ps(factors.base);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // A column and a multiple of 32 below 2^24: the quotient in floats is exact enough to round down.
  const __m512 width = _mm512_set1_ps(static_cast<float>(task.group_width));
  const __m512i group = _mm512_cvttps_epi32(_mm512_div_ps(_mm512_cvtepi32_ps(column), width));
  return _mm512_i32gather_ps(_mm512_add_epi32(_mm512_slli_epi32(group, 4), lane), factors.base, 4);
}

template <bool codes>
__m512 load_values(const SalientWeight& w, int64_t i, const TileFactors& factors) {
  if constexpr (codes) return load_codes(w, i, factors);
  return load16(static_cast<const Float16*>(w.value) + i);
}

// A step of a list: entries, columns (at most `last`) and differences of 16 rows.
template <bool codes, bool grouped>
struct ListStep {
  __m256i state = _mm256_set1_epi16(-1), column;
  __mmask16 entries;
  __m512 difference;

  void take(const SalientTask& task, const TileFactors& factors, int64_t step, __m256i last) {
    const SalientWeight& w = task.weight;
    const uint8_t* gap = w.gap + step * kTileRows;
    const __m128i gaps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(gap));
    prefetch(gap);
    prefetch(static_cast<const char*>(w.value) + step * kTileRows * (codes ? 1 : 2));
    entries = _mm_cmpneq_epu8_mask(gaps, _mm_set1_epi8(static_cast<char>(kNoEntry)));
    state = next_columns(state, gaps, entries);
    column = _mm256_min_epu16(state, last);
    const __m512 base = base_of<grouped>(task, factors, grouped ? _mm512_cvtepu16_epi32(column) : __m512i{});
    difference = detail::difference<codes>(load_values<codes>(w, step * kTileRows, factors), base, factors);
  }
};

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

// Difference of salient column j for the 16 rows of a tile.
template <bool codes>
__m512 column_difference(const Rows& rows, const int32_t* tile_values, int64_t j, const TileFactors& factors) {
  constexpr int64_t kInWord = codes ? 4 : 2;
  const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(32 / kInWord * (j % kInWord)));
  const __m512i bits = _mm512_srl_epi32(_mm512_loadu_si512(tile_values + j / kInWord * kTileRows), shift);
  const __m512 base = _mm512_loadu_ps(factors.base + rows.base_of[j]);
  if constexpr (codes) {
    const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(bits, _mm512_set1_epi32(255)));
    return difference<true>(_mm512_sub_ps(code, factors.zero), base, factors);
  }
  return difference<false>(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits)), base, factors);
}

template <bool codes>
const int32_t* values_of_tile(const SalientWeight& w, int64_t tile) {
  return static_cast<const int32_t*>(w.value) + tile * word_count(w.entries, codes ? 8 : 16) * kTileRows;
}

template <bool codes>
__m512 columns_single(const Rows& rows, int64_t tile, const float* x, const TileFactors& factors) {
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

// `count` values of a row from element i on, with the row's own scale and zero, to `out`.
template <bool codes, class Base>
void row_differences(const SalientWeight& w, int64_t row, int64_t i, int64_t count, const Base& base, float* out) {
  for (int64_t j = 0; j < count; j += 16) {
    const __mmask16 lanes = first_lanes(count - j);
    __m512 value;
    if constexpr (codes) {
      const __m128i bytes = _mm_maskz_loadu_epi8(lanes, static_cast<const uint8_t*>(w.value) + i + j);
      const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
      const __m512 shifted = _mm512_sub_ps(code, _mm512_set1_ps(w.value_zero[row]));
      value = _mm512_fmsub_ps(shifted, _mm512_set1_ps(w.value_scale[row]), base(j));
    } else {
      value = _mm512_sub_ps(load16(static_cast<const Float16*>(w.value) + i + j, lanes), base(j));
    }
    _mm512_storeu_ps(out + j, value);
  }
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

// Entries decoded to columns and differences: of a list or of salient columns [kChunkSteps][16], of a bitmap one row.
struct Chunk {
  alignas(64) int32_t column[kChunkSteps * kTileRows];
  alignas(64) float difference[kChunkSteps * kTileRows];
};
static_assert(kSegmentColumns + 16 <= kChunkSteps * kTileRows);

// Adds `count` entries that lie `stride` apart to the 32 sums of one output. x: [width][32].
void add_entries(const int32_t* column, const float* difference, int64_t count, int64_t stride, const float* x,
                 float* sums) {
  __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + 16);
  for (int64_t i = 0; i < count; ++i) {
    const float* a = x + int64_t{column[i * stride]} * kBlockRows;
    const __m512 factor = _mm512_set1_ps(difference[i * stride]);
    low = _mm512_fmadd_ps(_mm512_load_ps(a), factor, low);
    high = _mm512_fmadd_ps(_mm512_load_ps(a + 16), factor, high);
  }
  _mm512_store_ps(sums, low);
  _mm512_store_ps(sums + 16, high);
}

void add_chunk(const Chunk& chunk, int64_t steps, const float* x, float* sums) {
  for (int64_t lane = 0; lane < kTileRows; ++lane) {
    add_entries(chunk.column + lane, chunk.difference + lane, steps, kTileRows, x, sums + lane * kBlockRows);
  }
}

template <bool codes, bool grouped>
void list_block(const SalientTask& task, int64_t tile, const float* x, const TileFactors& factors, float* sums) {
  const SalientWeight& w = task.weight;
  const __m256i last = _mm256_set1_epi16(static_cast<int16_t>(w.k - 1));
  ListStep<codes, grouped> s;
  Chunk chunk;
  for (int64_t step = w.start[tile]; step < w.start[tile + 1];) {
    int64_t steps = 0;
    for (; steps < kChunkSteps && step < w.start[tile + 1]; ++steps, ++step) {
      s.take(task, factors, step, last);
      const __m512i zeros = _mm512_set1_epi32(static_cast<int>(w.k));  // the row of zeros after the last column
      const __m512i column = _mm512_mask_cvtepu16_epi32(zeros, s.entries, s.column);
      _mm512_store_si512(chunk.column + steps * kTileRows, column);
      _mm512_store_ps(chunk.difference + steps * kTileRows, _mm512_maskz_mov_ps(s.entries, s.difference));
    }
    add_chunk(chunk, steps, x, sums);
  }
}

template <bool codes>
void columns_block(const Rows& rows, int64_t tile, const float* x, const TileFactors& factors, float* sums) {
  const int32_t* values = values_of_tile<codes>(rows.task.weight, tile);
  Chunk chunk;
  for (int64_t j = 0; j < rows.width;) {
    int64_t steps = 0;
    for (; steps < kChunkSteps && j < rows.width; ++steps, ++j) {
      _mm512_store_si512(chunk.column + steps * kTileRows, _mm512_set1_epi32(static_cast<int>(j)));
      _mm512_store_ps(chunk.difference + steps * kTileRows, column_difference<codes>(rows, values, j, factors));
    }
    add_chunk(chunk, steps, x, sums);
  }
}

template <bool codes>
void bitmap_block(const SalientTask& task, int64_t tile, const float* x, const TileFactors& factors, float* sums) {
  const SalientWeight& w = task.weight;
  const int64_t words = word_count(w.k);
  Chunk chunk;
  for (int64_t lane = 0; lane < kTileRows && tile * kTileRows + lane < w.n; ++lane) {
    const int64_t row = tile * kTileRows + lane;
    int64_t entry = w.start[row];
    for (int64_t word = 0; word < words; word += kSegmentWords) {
      const int64_t end = word + kSegmentWords < words ? word + kSegmentWords : words;
      int64_t count = columns_of_words(w, tile, lane, word, end, chunk.column);
      if (count > w.start[row + 1] - entry) count = w.start[row + 1] - entry;  // contradictory arrays
      const auto base = [&](int64_t j) {
        if (task.groups == 1) return _mm512_set1_ps(factors.base[lane]);
        alignas(64) float each[16];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t column = j + i < count ? chunk.column[j + i] : 0;
          each[i] = factors.base[column / task.group_width * kTileRows + lane];
        }
        return _mm512_load_ps(each);
      };
      row_differences<codes>(w, row, entry, count, base, chunk.difference);
      add_entries(chunk.column, chunk.difference, count, 1, x, sums + lane * kBlockRows);
      entry += count;
    }
  }
}

// `count` rows of `width` floats to [width + 1][32]; rows that are missing, and the last column, are 0.
void transpose_rows(const float* x, int64_t width, int64_t count, float* out) {
  for (int64_t column = 0; column < width; column += 16) {
    const __mmask16 lanes = first_lanes(width - column);
    for (int64_t row = 0; row < kBlockRows; row += 4) {
      __m512 z[4];
      for (int i = 0; i < 4; ++i) {
        z[i] = row + i < count ? _mm512_maskz_loadu_ps(lanes, x + (row + i) * width + column) : _mm512_setzero_ps();
      }
      transpose4(z);
      for (int i = 0; i < 4; ++i) {
        alignas(64) float four[16];
        _mm512_store_ps(four, z[i]);
        for (int part = 0; part < 4; ++part) {
          if (column + 4 * part + i < width) {
            _mm_store_ps(out + (column + 4 * part + i) * kBlockRows + row, _mm_load_ps(four + 4 * part));
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < kBlockRows; ++i) out[width * kBlockRows + i] = 0.0f;
}

template <bool codes>
__m512 single(const Rows& rows, int64_t tile, const float* x, const TileFactors& factors) {
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
void block(const Rows& rows, int64_t tile, const float* x, const TileFactors& factors, float* sums) {
  const SalientTask& task = rows.task;
  switch (task.weight.encoding) {
    case SalientEncoding::list:
      if (task.groups == 1) return list_block<codes, false>(task, tile, x, factors, sums);
      return list_block<codes, true>(task, tile, x, factors, sums);
    case SalientEncoding::columns:
      return columns_block<codes>(rows, tile, x, factors, sums);
    default:
      return bitmap_block<codes>(task, tile, x, factors, sums);
  }
}

template <bool codes>
void multiply(const Rows& rows, int64_t begin, int64_t end, TileFactors& factors) {
  const SalientTask& task = rows.task;
  const __m512i lane_of = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(kBlockRows));
  const bool few = task.m < kFewRows;
  float* x = new_scratch<float>(few ? ceil_div(rows.width, 32) * 32 : (rows.width + 1) * kBlockRows);
  float* sums = new_scratch<float>(kTileRows * kBlockRows);
  for (int64_t row = 0; row < task.m; row += few ? 1 : kBlockRows) {
    const int64_t count = task.m - row < kBlockRows ? task.m - row : kBlockRows;
    const float* from = rows.x + row * rows.width;
    if (few) {
      for (int64_t i = 0; i < rows.width; ++i) x[i] = from[i];
    } else {
      transpose_rows(from, rows.width, count, x);
    }
    for (int64_t tile = begin; tile < end; ++tile) {
      factors.load(task, tile);
      if (few) {
        const __m512 sum = single<codes>(rows, tile, x, factors);
        finish(task, row, tile, sum, factors, rows.totals + row * task.groups);
        continue;
      }
      for (int64_t i = 0; i < kTileRows * kBlockRows; ++i) sums[i] = 0.0f;
      block<codes>(rows, tile, x, factors, sums);
      for (int64_t r = 0; r < count; ++r) {
        const __m512 sum = _mm512_i32gather_ps(lane_of, sums + r, 4);
        finish(task, row + r, tile, sum, factors, rows.totals + (row + r) * task.groups);
      }
    }
  }
  delete_scratch(sums);
  delete_scratch(x);
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
  float* totals = new_scratch<float>(task.m * task.groups);
  float* chosen = new_scratch<float>(columns ? task.m * width : 0);
  int32_t* base_of = new_scratch<int32_t>(columns ? width : 0);
  float* factor = new_scratch<float>(2 * task.groups * kTileRows);
  if (w.mu) row_totals(task, totals);
  for (int64_t j = 0; columns && j < width; ++j) {
    base_of[j] = static_cast<int32_t>(w.column[j] / task.group_width * kTileRows);
    for (int64_t row = 0; row < task.m; ++row) chosen[row * width + j] = task.x[row * w.k + w.column[j]];
  }
  TileFactors factors{{}, {}, factor, w.mu ? factor + task.groups * kTileRows : nullptr};
  const Rows rows{task, width, columns ? chosen : task.x, totals, base_of};
  w.value_scale ? multiply<true>(rows, begin, end, factors) : multiply<false>(rows, begin, end, factors);
  delete_scratch(factor);
  delete_scratch(base_of);
  delete_scratch(chosen);
  delete_scratch(totals);
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
