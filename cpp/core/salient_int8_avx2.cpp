// SPDX-License-Identifier: Apache-2.0
// The salient part with int8 activations, uint8 codes and one group: lists and bitmaps row by row, for few rows, and
// salient columns.
#include "salient_int8_avx2.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kChunkWords = 64;   // words of 4 salient columns that are prepared together
constexpr int64_t kExactSteps = 512;  // 512 x 255 x 127 < 2^24: such sums are exact in float32

struct Integers {
  __m256i low, high;  // one for each output of a tile
};

Outputs to_sums(Integers code, Integers plain, const TileFactors& f) {
  const Outputs base = load_outputs(f.base);
  return {to_sum(code.low, plain.low, _mm256_load_ps(f.scale), _mm256_load_ps(f.zero), base.low),
          to_sum(code.high, plain.high, _mm256_load_ps(f.scale + 8), _mm256_load_ps(f.zero + 8), base.high)};
}

void add_floats(Integers& to, Outputs v) {
  to = {_mm256_add_epi32(to.low, _mm256_cvtps_epi32(v.low)), _mm256_add_epi32(to.high, _mm256_cvtps_epi32(v.high))};
}

// `x`: the row as floats, and a 0 after its end.
Outputs list_single(const SalientWeight& w, int64_t tile, const float* x, const TileFactors& factors) {
  const __m256 nothing = _mm256_setzero_ps();
  const __m256i none = _mm256_setzero_si256();
  Integers code_sums{none, none}, plain_sums = code_sums;
  ListColumns list;
  for (int64_t step = w.start[tile]; step < w.start[tile + 1];) {
    const int64_t pause = step + kExactSteps < w.start[tile + 1] ? step + kExactSteps : w.start[tile + 1];
    Outputs code{nothing, nothing}, plain = code;
    for (; step < pause; ++step) {
      const uint8_t* gap = w.gap + step * kTileRows;
      const auto* value = static_cast<const uint8_t*>(w.value) + step * kTileRows;
      prefetch(gap);
      prefetch(value);
      list.move(gap);
      alignas(32) uint16_t column[kTileRows];
      store_bits(column, list.columns(w.k));
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value));
      const __m256 low = fetch8(x, column), high = fetch8(x, column + 8);
      code = {_mm256_fmadd_ps(codes_to_floats(codes), low, code.low),
              _mm256_fmadd_ps(codes_to_floats(_mm_srli_si128(codes, 8)), high, code.high)};
      plain = {_mm256_add_ps(plain.low, low), _mm256_add_ps(plain.high, high)};
    }
    add_floats(code_sums, code);
    add_floats(plain_sums, plain);
  }
  return to_sums(code_sums, plain_sums, factors);
}

int32_t sum_of(__m256i v) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

// One output: the codes of 16 columns move apart to where their activations are. Activations are there as 16 bits, and
// as bytes less -128, whose sum vpsadbw takes. `value`: as for floats.
void bitmap_output(const SalientWeight& w, int64_t tile, int64_t lane, const int16_t* q, const uint8_t* positive,
                   const uint8_t* value, int32_t* code_sum, int32_t* plain_sum) {
  const __m128i nothing = _mm_setzero_si128();
  __m256i code = _mm256_setzero_si256();
  __m128i plain = nothing;
  const uint8_t* next = value;
  for (int64_t word = 0; word < word_count(w.k); ++word) {
    const uint32_t bits = mask_word(w, tile, lane, word);
    prefetch(next);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const uint32_t first = bits >> (16 * half) & 255, second = bits >> (16 * half + 8) & 255;
      const auto load = [](const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); };
      const __m128i rank0 = load(kPlaces.rank[first]), rank1 = load(kPlaces.rank[second]);
      const __m128i codes0 = _mm_shuffle_epi8(load(next), rank0);
      next += _mm_popcnt_u32(first);
      const __m128i codes1 = _mm_shuffle_epi8(load(next), rank1);
      next += _mm_popcnt_u32(second);
      const __m256i apart = _mm256_cvtepu8_epi16(_mm_unpacklo_epi64(codes0, codes1));
      const int64_t column = 32 * word + 16 * half;
      code = _mm256_add_epi32(code, _mm256_madd_epi16(apart, load_bits(q + column)));
      const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(positive + column));
      const __m128i chosen = _mm_blendv_epi8(all, nothing, _mm_unpacklo_epi64(rank0, rank1));
      plain = _mm_add_epi64(plain, _mm_sad_epu8(chosen, nothing));
    }
  }
  *code_sum = sum_of(code);
  *plain_sum = static_cast<int32_t>(_mm_cvtsi128_si64(plain) + _mm_extract_epi64(plain, 1) - 128 * (next - value));
}

// A row of activations in the forms that lists and bitmaps read.
struct Row {
  Scratch<float> wide;
  Scratch<int16_t> q;
  Scratch<uint8_t> positive, spare;  // spare: room for the codes of an output and 8 more
};

Outputs bitmap_single(const SalientWeight& w, int64_t tile, const Row& row, const TileFactors& factors) {
  const int64_t words = word_count(w.k), most = 32 * words;
  const int32_t* next_mask = w.mask + (tile + 1 < tile_count(w.n) ? tile + 1 : tile) * words * kTileRows;
  alignas(32) int32_t code[kTileRows] = {}, plain[kTileRows] = {};
  for (int64_t lane = 0; lane < outputs_of_tile(w, tile); ++lane) {
    for (int64_t word = lane; word < words; word += kTileRows) {
      _mm_prefetch(reinterpret_cast<const char*>(next_mask + word * kTileRows), _MM_HINT_T0);
    }
    const int64_t entry = w.start[tile * kTileRows + lane], left = w.entries - entry;
    const uint8_t* value = static_cast<const uint8_t*>(w.value) + entry;
    if (left < most + 8) {
      if (left > 0) __builtin_memcpy(row.spare, value, static_cast<size_t>(left < most ? left : most));
      value = row.spare;
    }
    bitmap_output(w, tile, lane, row.q, row.positive, value, code + lane, plain + lane);
  }
  return to_sums({load_bits(code), load_bits(code + 8)}, {load_bits(plain), load_bits(plain + 8)}, factors);
}

void multiply_few(const SalientTask& task, const float* totals, int64_t begin, int64_t end, TileFactors& factors) {
  const SalientWeight& w = task.weight;
  const int64_t room = (word_count(w.k) + 1) * 32;  // at least one zero after the last column
  const Row x{{room, 0}, {room, 0}, {room, 0}, {room, 0}};
  for (int64_t row = 0; row < task.m; ++row) {
    const int8_t* q = task.q + row * w.k;
    for (int64_t i = 0; i < w.k; ++i) {
      x.wide[i] = static_cast<float>(q[i]), x.q[i] = q[i], x.positive[i] = static_cast<uint8_t>(q[i] + 128);
    }
    for (int64_t tile = begin; tile < end; ++tile) {
      factors.load(task, tile);
      const Outputs sum = w.encoding == SalientEncoding::list ? list_single(w, tile, x.wide, factors)
                                                              : bitmap_single(w, tile, x, factors);
      finish(task, row, tile, sum, factors, totals + row);
    }
  }
}

void add_pair(Integers& sum, Integers codes, const int32_t* pair) {
  const __m256i q = _mm256_set1_epi32(*pair);
  sum = {_mm256_add_epi32(sum.low, _mm256_madd_epi16(codes.low, q)),
         _mm256_add_epi32(sum.high, _mm256_madd_epi16(codes.high, q))};
}

// Adds `pairs` pairs of columns to the sums of some rows, [row][16]. panel: [pair][16][2]. x: pairs, `width` apart.
template <int rows>
[[gnu::noinline]] void add_columns(const int16_t* panel, int64_t pairs, const int32_t* x, int64_t width,
                                   int32_t* sums) {
  constexpr int64_t kNext = rows > 1 ? kTileRows : 0;
  const int64_t next = rows > 1 ? width : 0;
  const auto load = [](const int32_t* p) { return Integers{load_bits(p), load_bits(p + 8)}; };
  const auto store = [](int32_t* p, Integers v) { store_bits(p, v.low), store_bits(p + 8, v.high); };
  Integers s0 = load(sums), s1 = load(sums + kNext), s2 = load(sums + 2 * kNext), s3 = load(sums + 3 * kNext);
  for (int64_t i = 0; i < pairs; ++i, ++x, panel += 2 * kTileRows) {
    const Integers codes{load_bits(panel), load_bits(panel + kTileRows)};
    add_pair(s0, codes, x);
    if constexpr (rows > 1)
      add_pair(s1, codes, x + next), add_pair(s2, codes, x + 2 * next), add_pair(s3, codes, x + 3 * next);
  }
  store(sums, s0);
  if constexpr (rows > 1) store(sums + kNext, s1), store(sums + 2 * kNext, s2), store(sums + 3 * kNext, s3);
}

// A word of 4 columns is two pairs: columns 0 and 2, and 1 and 3, which one mask each brings to 16 bits.
void multiply_columns(const SalientTask& task, const float* totals, int64_t begin, int64_t end, TileFactors& factors) {
  const SalientWeight& w = task.weight;
  const int64_t words = ceil_div(w.entries, 4), width = 2 * words;
  Scratch<int32_t> x(task.m * width, 0);
  Scratch<int32_t> chosen(task.m, 0);  // T, which all outputs have in common
  Scratch<int32_t> sums(task.m * kTileRows, 0);
  for (int64_t row = 0; row < task.m; ++row) {
    for (int64_t j = 0; j < w.entries; ++j) {
      const int32_t q = task.q[row * w.k + w.column[j]];
      chosen[row] += q;
      x[row * width + j / 4 * 2 + j % 2] |=
          j % 4 < 2 ? q & 0xFFFF : static_cast<int32_t>(static_cast<uint32_t>(q) << 16);
    }
  }
  alignas(32) int16_t panel[kChunkWords * 4 * kTileRows];
  for (int64_t tile = begin; tile < end; ++tile) {
    factors.load(task, tile);
    for (int64_t i = 0; i < task.m * kTileRows; ++i) sums[i] = 0;
    for (int64_t first = 0; first < words; first += kChunkWords) {
      const int64_t count = words - first < kChunkWords ? words - first : kChunkWords;
      const int32_t* value = static_cast<const int32_t*>(w.value) + (tile * words + first) * kTileRows;
      const __m256i bytes = _mm256_set1_epi32(0x00FF00FF);
      for (int64_t word = 0; word < count; ++word) {
        prefetch(value + word * kTileRows);
        for (int64_t half = 0; half < 2; ++half) {
          const __m256i codes = load_bits(value + word * kTileRows + 8 * half);
          int16_t* to = panel + word * 4 * kTileRows + half * kTileRows;
          store_bits(to, _mm256_and_si256(codes, bytes));
          store_bits(to + 2 * kTileRows, _mm256_and_si256(_mm256_srli_epi32(codes, 8), bytes));
        }
      }
      const auto at = [&](int64_t row) { return x + row * width + 2 * first; };
      int64_t row = 0;
      for (; row + 4 <= task.m; row += 4) add_columns<4>(panel, 2 * count, at(row), width, sums + row * kTileRows);
      for (; row < task.m; ++row) add_columns<1>(panel, 2 * count, at(row), width, sums + row * kTileRows);
    }
    for (int64_t row = 0; row < task.m; ++row) {
      const int32_t* from = sums + row * kTileRows;
      const __m256i plain = _mm256_set1_epi32(chosen[row]);
      const Outputs sum = to_sums({load_bits(from), load_bits(from + 8)}, {plain, plain}, factors);
      finish(task, row, tile, sum, factors, totals + row);
    }
  }
}

}  // namespace

void salient_tiles_int8_avx2(const SalientTask& task, int64_t begin, int64_t end) {
  const SalientWeight& w = task.weight;
  Scratch<float> totals(task.m, 0);
  for (int64_t row = 0; row < task.m; ++row) totals[row] = static_cast<float>(task.total[row]);
  float factor[2 * kTileRows];
  TileFactors factors{{}, {}, factor, w.mu ? factor + kTileRows : nullptr};
  if (w.encoding == SalientEncoding::columns) {
    multiply_columns(task, totals, begin, end, factors);
  } else if (few_rows(task)) {
    multiply_few(task, totals, begin, end, factors);
  } else {
    salient_int8_many_rows_avx2(task, totals, begin, end);
  }
}

}  // namespace bitmill::detail
