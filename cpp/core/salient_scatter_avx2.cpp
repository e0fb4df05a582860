// SPDX-License-Identifier: Apache-2.0
// The salient part with float activations: lists and bitmaps row by row, for few rows, and salient columns. A list has
// a lane for each of the tile's 16 outputs; a bitmap goes output by output; columns are a small dense product.
#include "salient_floats_avx2.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kChunkColumns = 64;  // salient columns that are decoded together

template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}

// Even and odd steps, kListSteps at a time: the same sums in the same order as those of many rows.
template <bool codes, bool grouped>
Outputs list_single(const SalientTask& task, int64_t tile, const float* x, const TileFactors& factors) {
  const SalientWeight& w = task.weight;
  const __m256 nothing = _mm256_setzero_ps();
  const auto add = [](Outputs& to, Outputs v) { to = {_mm256_add_ps(to.low, v.low), _mm256_add_ps(to.high, v.high)}; };
  Outputs sum{nothing, nothing};
  ListColumns list;
  for (int64_t step = w.start[tile]; step < w.start[tile + 1];) {
    Outputs even{nothing, nothing}, odd = even;
    const auto take = [&](Outputs& to) {
      alignas(32) uint16_t column[kTileRows];
      const Outputs found = take_step<codes, grouped>(task, factors, step++, list, column);
      to = {_mm256_fmadd_ps(fetch8(x, column), found.low, to.low),
            _mm256_fmadd_ps(fetch8(x, column + 8), found.high, to.high)};
    };
    const int64_t end = smaller<int64_t>(step + kListSteps, w.start[tile + 1]);
    while (step + 2 <= end) take(even), take(odd);
    if (step < end) take(even);
    add(even, odd);
    add(sum, even);
  }
  return sum;
}

float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// One output: the values of a word's 32 columns move apart to where their activations are, 8 columns at a time. x: with
// zeros up to a multiple of 32, which is why bits past k do not matter. `value`: from the output's first one on, and as
// many as columns, whatever the mask says.
template <bool codes>
float bitmap_output(const SalientTask& task, int64_t tile, int64_t lane, const float* x, const void* value,
                    const TileFactors& factors) {
  const SalientWeight& w = task.weight;
  const int64_t words = word_count(w.k), group_words = ceil_div(task.group_width, 32);
  const int32_t* mask = w.mask + tile * words * kTileRows + lane;
  __m256 even = _mm256_setzero_ps(), odd = even, all = even;
  float from_signs = 0.0f;
  int64_t entry = 0;
  for (int64_t group = 0; group < task.groups; ++group) {
    const int64_t end = smaller((group + 1) * group_words, words);
    __m256 total = _mm256_setzero_ps(), other = total;
    for (int64_t word = group * group_words; word < end; ++word) {
      const uint32_t bits = static_cast<uint32_t>(mask[word * kTileRows]);
      prefetch(static_cast<const char*>(value) + entry * (codes ? 1 : 2));
      const auto add_eight = [&](int byte, __m256& sum, __m256& plain) {
        const uint32_t eight = bits >> (8 * byte) & 255;
        const auto* rank = reinterpret_cast<const __m128i*>(kPlaces.rank[eight]);
        const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(rank));  // negative where there is no value
        const __m256 a = _mm256_loadu_ps(x + 32 * word + 8 * byte);
        const __m256 chosen = _mm256_blendv_ps(a, _mm256_setzero_ps(), _mm256_castsi256_ps(wide));
        __m256 apart = _mm256_permutevar8x32_ps(load_values<codes>(value, entry), wide);
        // 0 x anything is 0 for codes; a float16 may be an infinity of the next row.
        if constexpr (!codes) apart = _mm256_blendv_ps(apart, _mm256_setzero_ps(), _mm256_castsi256_ps(wide));
        sum = _mm256_fmadd_ps(chosen, apart, sum);
        plain = _mm256_add_ps(plain, chosen);
        entry += _mm_popcnt_u32(eight);
      };
      add_eight(0, even, total), add_eight(1, odd, other), add_eight(2, even, total), add_eight(3, odd, other);
    }
    total = _mm256_add_ps(total, other);
    all = _mm256_add_ps(all, total);
    from_signs += factors.base[group * kTileRows + lane] * sum_of(total);
  }
  const float sum = sum_of(_mm256_add_ps(even, odd));
  return (codes ? factors.scale[lane] * (sum - factors.zero[lane] * sum_of(all)) : sum) - from_signs;
}

// `spare`: room for a row's values and 8 more, for those near the end of the array.
template <bool codes>
Outputs bitmap_single(const SalientTask& task, int64_t tile, const float* x, const TileFactors& factors, char* spare) {
  constexpr int64_t kSize = codes ? 1 : 2;
  const SalientWeight& w = task.weight;
  const int64_t words = word_count(w.k), most = 32 * words;
  const int32_t* mask = w.mask + tile * words * kTileRows;
  const int32_t* next_mask = tile + 1 < tile_count(w.n) ? mask + words * kTileRows : mask;
  alignas(32) float value[kTileRows] = {};
  for (int64_t lane = 0; lane < outputs_of_tile(w, tile); ++lane) {
    for (int64_t word = lane; word < words; word += kTileRows) {
      _mm_prefetch(reinterpret_cast<const char*>(next_mask + word * kTileRows), _MM_HINT_T0);
    }
    const int64_t entry = w.start[tile * kTileRows + lane], left = w.entries - entry;
    const char* from = static_cast<const char*>(w.value) + entry * kSize;
    if (left < most + 8) {
      if (left > 0) __builtin_memcpy(spare, from, static_cast<size_t>(smaller(left, most) * kSize));
      from = spare;
    }
    value[lane] = bitmap_output<codes>(task, tile, lane, x, from, factors);
  }
  return load_outputs(value);
}

template <bool codes>
Outputs single(const SalientTask& task, int64_t tile, const float* x, const TileFactors& factors, char* spare) {
  if (task.weight.encoding == SalientEncoding::bitmap) return bitmap_single<codes>(task, tile, x, factors, spare);
  if (task.groups == 1) return list_single<codes, false>(task, tile, x, factors);
  return list_single<codes, true>(task, tile, x, factors);
}

template <bool codes>
void multiply_few(const SalientFloatRows& rows, int64_t begin, int64_t end, TileFactors& factors) {
  const SalientTask& task = rows.task;
  const int64_t room = (word_count(rows.width) + 1) * 32;  // at least one zero after the last column
  Scratch<float> x(room, 0);
  Scratch<char> spare(2 * room, 0);
  for (int64_t row = 0; row < task.m; ++row) {
    for (int64_t i = 0; i < rows.width; ++i) x[i] = rows.x[row * rows.width + i];
    for (int64_t tile = begin; tile < end; ++tile) {
      factors.load(task, tile);
      const Outputs sum = single<codes>(task, tile, x, factors, spare);
      finish(task, row, tile, sum, factors, rows.totals + row * task.groups);
    }
  }
}

// Differences of salient columns [begin, end) of a tile: [column][16]. base_of: where a column's base lies.
template <bool codes>
void decode_columns(const SalientFloatRows& rows, int64_t tile, int64_t begin, int64_t end, const int32_t* base_of,
                    const TileFactors& factors, float* panel) {
  constexpr int64_t kInWord = codes ? 4 : 2;
  const int64_t words = ceil_div(rows.width, kInWord);
  const int32_t* values = static_cast<const int32_t*>(rows.task.weight.value) + tile * words * kTileRows;
  for (int64_t j = begin; j < end; ++j) {
    const int32_t* word = values + j / kInWord * kTileRows;
    if (j % kInWord == 0) prefetch(word);
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(32 / kInWord * (j % kInWord)));
    for (int64_t half = 0; half < kTileRows; half += 8) {
      const __m256i bits = _mm256_srl_epi32(load_bits(word + half), shift);
      __m256 value;
      if constexpr (codes) {
        value = _mm256_cvtepi32_ps(_mm256_and_si256(bits, _mm256_set1_epi32(255)));
      } else {
        const __m256i low = _mm256_and_si256(bits, _mm256_set1_epi32(0xFFFF));
        value = _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
      }
      const __m256 base = _mm256_loadu_ps(factors.base + base_of[j] + half);
      const __m256 scale = _mm256_load_ps(factors.scale + half), zero = _mm256_load_ps(factors.zero + half);
      _mm256_storeu_ps(panel + (j - begin) * kTileRows + half, difference<codes>(value, base, scale, zero));
    }
  }
}

void add_column(Outputs& sum, Outputs panel, const float* x) {
  const __m256 a = _mm256_broadcast_ss(x);
  sum = {_mm256_fmadd_ps(panel.low, a, sum.low), _mm256_fmadd_ps(panel.high, a, sum.high)};
}

// Adds `columns` columns to the sums of some rows, [row][16]. x: `width` apart.
template <int rows>
void add_columns(const float* panel, int64_t columns, const float* x, int64_t width, float* sums) {
  constexpr int64_t kNext = rows > 1 ? kTileRows : 0;
  const int64_t next = rows > 1 ? width : 0;
  Outputs s0 = load_outputs(sums), s1 = load_outputs(sums + kNext);
  Outputs s2 = load_outputs(sums + 2 * kNext), s3 = load_outputs(sums + 3 * kNext);
  for (int64_t j = 0; j < columns; ++j, ++x, panel += kTileRows) {
    const Outputs values = load_outputs(panel);
    add_column(s0, values, x);
    if constexpr (rows > 1) {
      add_column(s1, values, x + next);
      add_column(s2, values, x + 2 * next);
      add_column(s3, values, x + 3 * next);
    }
  }
  store_outputs(sums, s0);
  if constexpr (rows > 1) {
    store_outputs(sums + kNext, s1), store_outputs(sums + 2 * kNext, s2), store_outputs(sums + 3 * kNext, s3);
  }
}

void multiply_columns(const SalientTask& task, const float* totals, int64_t begin, int64_t end, TileFactors& factors) {
  const SalientWeight& w = task.weight;
  const int64_t width = w.entries;
  Scratch<float> x(task.m * width, 0);
  Scratch<float> sums(task.m * kTileRows, 0);
  Scratch<int32_t> base_of(width, 0);
  for (int64_t j = 0; j < width; ++j) {
    base_of[j] = static_cast<int32_t>(w.column[j] / task.group_width * kTileRows);
  }
  for (int64_t row = 0; row < task.m; ++row) {
    for (int64_t j = 0; j < width; ++j) x[row * width + j] = task.x[row * w.k + w.column[j]];
  }
  const SalientFloatRows rows{task, width, x, totals};
  alignas(32) float panel[kChunkColumns * kTileRows];
  for (int64_t tile = begin; tile < end; ++tile) {
    factors.load(task, tile);
    for (int64_t i = 0; i < task.m * kTileRows; ++i) sums[i] = 0.0f;
    for (int64_t j = 0; j < width; j += kChunkColumns) {
      const int64_t stop = smaller(j + kChunkColumns, width);
      (w.value_scale ? decode_columns<true> : decode_columns<false>)(rows, tile, j, stop, base_of, factors, panel);
      int64_t row = 0;
      for (; row + 4 <= task.m; row += 4) {
        add_columns<4>(panel, stop - j, x + row * width + j, width, sums + row * kTileRows);
      }
      for (; row < task.m; ++row) {
        add_columns<1>(panel, stop - j, x + row * width + j, width, sums + row * kTileRows);
      }
    }
    for (int64_t row = 0; row < task.m; ++row) {
      finish(task, row, tile, load_outputs(sums + row * kTileRows), factors, totals + row * task.groups);
    }
  }
}

void row_totals(const SalientTask& task, float* totals) {
  const int64_t k = task.weight.k;
  for (int64_t row = 0; row < task.m; ++row) {
    for (int64_t group = 0; group < task.groups; ++group) {
      const float* x = task.x + row * k;
      const int64_t end = smaller((group + 1) * task.group_width, k);
      int64_t c = group * task.group_width;
      __m256 sum = _mm256_setzero_ps(), other = sum;
      for (; c + 16 <= end; c += 16) {
        sum = _mm256_add_ps(sum, _mm256_loadu_ps(x + c));
        other = _mm256_add_ps(other, _mm256_loadu_ps(x + c + 8));
      }
      float total = sum_of(_mm256_add_ps(sum, other));
      for (; c < end; ++c) total += x[c];
      totals[row * task.groups + group] = total;
    }
  }
}

}  // namespace

void salient_tiles_avx2(const SalientTask& task, int64_t begin, int64_t end) {
  const SalientWeight& w = task.weight;
  Scratch<float> totals(task.m * task.groups, 0);
  Scratch<float> factor(2 * task.groups * kTileRows, 0);
  if (w.mu) row_totals(task, totals);
  TileFactors factors{{}, {}, factor, w.mu ? factor + task.groups * kTileRows : nullptr};
  const SalientFloatRows rows{task, w.k, task.x, totals};
  if (w.encoding == SalientEncoding::columns) {
    multiply_columns(task, totals, begin, end, factors);
  } else if (few_rows(task)) {
    (w.value_scale ? multiply_few<true> : multiply_few<false>)(rows, begin, end, factors);
  } else {
    salient_many_rows_avx2(rows, begin, end);
  }
}

void widen_avx2(Dtype dtype, const void* x, int64_t count, float* out) {
  with_dtype(dtype, x, [&](const auto* values) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, load8(values + i));
    for (; i < count; ++i) out[i] = to_float(values[i]);
  });
}

}  // namespace bitmill::detail
