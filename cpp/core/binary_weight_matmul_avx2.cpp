// SPDX-License-Identifier: Apache-2.0
// Float activations times 1-bit weights by table lookup (lookup_tables_avx2.h). 4 rows share the shifted bits of a
// tile; a single row takes 4 tiles and runs at the speed of memory. Exact float32 activations.
#include "binary_matmul.h"
#include "layout.h"
#include "lookup_tables_avx2.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kRows = 4;            // rows side by side
constexpr int64_t kTiles = 4;           // tiles side by side for a single row
constexpr int64_t kPrefetchWords = 24;  // how far ahead a single row asks for its bits: 1.5 KiB a tile

struct Task {
  const BinaryWeightMatmulParams& p;
  int64_t words, groups, group_words;
  int64_t end;  // the first tile that belongs to somebody else

  int64_t group_end(int64_t group) const { return std::min((group + 1) * group_words, words); }
  const int32_t* tile(int64_t t) const { return p.weight + std::min(t, end - 1) * words * kTileRows; }
};

struct Sums {  // of the 16 outputs of a tile
  __m256 low = _mm256_setzero_ps(), high = low;
};

// The first `count` of 8 floats, `step` apart.
__m256 load_some(const float* x, int64_t step, int64_t count) {
  float part[8] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = x[i * step];
  return _mm256_loadu_ps(part);
}

// Scales of 8 outputs and a group. Of outputs past n they are 0.
__m256 scales(const Task& task, int64_t column, int64_t group) {
  const float* s = task.p.scale + column * task.groups + group;
  const int64_t step = task.groups, count = task.p.n - column;
  if (count < 8) return load_some(s, step, count);
  if (step == 1) return _mm256_loadu_ps(s);
  return _mm256_setr_ps(s[0], s[step], s[2 * step], s[3 * step], s[4 * step], s[5 * step], s[6 * step], s[7 * step]);
}
Sums tile_scales(const Task& task, int64_t tile, int64_t group) {
  return {scales(task, tile * kTileRows, group), scales(task, tile * kTileRows + 8, group)};
}

// What the sums of a group add to the results, which stay in memory: registers are for the sums.
[[gnu::always_inline]] inline void add_scaled(float* result, Sums scale, Sums sums) {
  _mm256_store_ps(result, _mm256_add_ps(_mm256_load_ps(result), _mm256_mul_ps(scale.low, sums.low)));
  _mm256_store_ps(result + 8, _mm256_add_ps(_mm256_load_ps(result + 8), _mm256_mul_ps(scale.high, sums.high)));
}

template <class T>
void finish(const Task& task, int64_t row, int64_t column, __m256 value) {
  const BinaryWeightMatmulParams& p = task.p;
  const int64_t count = p.n - column;
  if (count <= 0) return;
  if (p.addend) {
    const float* addend = p.addend.at(row, column / kTileRows) + column % kTileRows;
    value = _mm256_add_ps(value, _mm256_loadu_ps(addend));
  }
  T* out = static_cast<T*>(p.out) + row * p.n + column;
  if (count >= 8) {
    if (p.bias) value = _mm256_add_ps(value, _mm256_loadu_ps(p.bias + column));
    return store8(out, value);
  }
  if (p.bias) value = _mm256_add_ps(value, load_some(p.bias + column, 1, count));
  T part[8];
  store8(part, value);
  std::copy_n(part, count, out);
}

template <class T>
void finish(const Task& task, int64_t row, int64_t tile, const float* result) {
  if (tile >= task.end) return;
  finish<T>(task, row, tile * kTileRows, _mm256_load_ps(result));
  finish<T>(task, row, tile * kTileRows + 8, _mm256_load_ps(result + 8));
}

// 4 columns of a row: a table for each pair of them.
void add(Sums& sums, const float* table, __m256i low, __m256i low_next, __m256i high, __m256i high_next) {
  const __m256 first = broadcast_four(table), second = broadcast_four(table + 4);
  look_up(sums.low, low, first, low_next, second);
  look_up(sums.high, high, first, high_next, second);
}

// 4 rows from their tables, side by side, times a tile.
template <class T>
[[gnu::noinline]] void block(const Task& task, int64_t row, int64_t tile, const float* tables) {
  const int32_t* weight = task.tile(tile);
  alignas(32) float results[kRows][kTileRows] = {};
  for (int64_t group = 0; group < task.groups; ++group) {
    const int64_t begin = group * task.group_words, end = task.group_end(group);
    Sums r0, r1, r2, r3;
    const float* table = tables + begin * kRows * kWordFloats;
    for (int64_t w = begin; w < end; ++w) {
      __m256i low = load_bits(weight + w * kTileRows), high = load_bits(weight + w * kTileRows + 8);
      const float* last = table + kRows * kWordFloats;
#pragma GCC unroll 1
      for (; table != last; table += kRows * kFourFloats) {
        const __m256i low_next = _mm256_srli_epi32(low, 2), high_next = _mm256_srli_epi32(high, 2);
        add(r0, table, low, low_next, high, high_next);
        add(r1, table + kFourFloats, low, low_next, high, high_next);
        add(r2, table + 2 * kFourFloats, low, low_next, high, high_next);
        add(r3, table + 3 * kFourFloats, low, low_next, high, high_next);
        low = _mm256_srli_epi32(low, 4), high = _mm256_srli_epi32(high, 4);
      }
    }
    const Sums scale = tile_scales(task, tile, group);
    add_scaled(results[0], scale, r0), add_scaled(results[1], scale, r1), add_scaled(results[2], scale, r2),
        add_scaled(results[3], scale, r3);
  }
  finish<T>(task, row, tile, results[0]), finish<T>(task, row + 1, tile, results[1]);
  finish<T>(task, row + 2, tile, results[2]), finish<T>(task, row + 3, tile, results[3]);
}

// The 8 columns of one byte of a word for 8 outputs. A load that begins at the byte spares a shift; it reaches 3 bytes
// past the word, so the last word of a tile is shifted.
template <bool last>
[[gnu::always_inline]] inline void add_byte(__m256& sum, const int32_t* word, int byte, __m256 t0, __m256 t1, __m256 t2,
                                            __m256 t3) {
  const __m256i bits = last ? _mm256_srl_epi32(load_bits(word), _mm_cvtsi32_si128(8 * byte))
                            : load_bits(reinterpret_cast<const char*>(word) + byte);
  look_up(sum, bits, t0, _mm256_srli_epi32(bits, 2), t1);
  look_up(sum, _mm256_srli_epi32(bits, 4), t2, _mm256_srli_epi32(bits, 6), t3);
}

template <bool last>
[[gnu::always_inline]] inline void add_byte(Sums& sums, const int32_t* word, int byte, __m256 t0, __m256 t1, __m256 t2,
                                            __m256 t3) {
  add_byte<last>(sums.low, word, byte, t0, t1, t2, t3);
  add_byte<last>(sums.high, word + 8, byte, t0, t1, t2, t3);
}

// The 32 columns of a word for 4 tiles.
template <bool last>
[[gnu::always_inline]] inline void add_word(Sums& s0, Sums& s1, Sums& s2, Sums& s3, const int32_t* w0,
                                            const int32_t* w1, const int32_t* w2, const int32_t* w3,
                                            const float* table) {
#pragma GCC unroll 1
  for (int byte = 0; byte < 4; ++byte, table += 2 * kFourFloats) {
    const __m256 t0 = broadcast_four(table), t1 = broadcast_four(table + 4), t2 = broadcast_four(table + 8),
                 t3 = broadcast_four(table + 12);
    add_byte<last>(s0, w0, byte, t0, t1, t2, t3);
    add_byte<last>(s1, w1, byte, t0, t1, t2, t3);
    add_byte<last>(s2, w2, byte, t0, t1, t2, t3);
    add_byte<last>(s3, w3, byte, t0, t1, t2, t3);
  }
}

// One row times 4 tiles side by side. Tiles past the end repeat the last one, unstored.
template <class T>
[[gnu::noinline]] void single(const Task& task, int64_t row, int64_t tile, const float* tables) {
  const int32_t *w0 = task.tile(tile), *w1 = task.tile(tile + 1), *w2 = task.tile(tile + 2), *w3 = task.tile(tile + 3);
  alignas(32) float results[kTiles][kTileRows] = {};
  for (int64_t group = 0; group < task.groups; ++group) {
    Sums s0, s1, s2, s3;
    const int64_t group_end = task.group_end(group), end = group_end < task.words ? group_end : group_end - 1;
    for (int64_t w = group * task.group_words; w < end; ++w) {
      for (const int32_t* t : {w0, w1, w2, w3}) {
        _mm_prefetch(reinterpret_cast<const char*>(t + kPrefetchWords * kTileRows), _MM_HINT_T0);
      }
      add_word<false>(s0, s1, s2, s3, w0, w1, w2, w3, tables);
      w0 += kTileRows, w1 += kTileRows, w2 += kTileRows, w3 += kTileRows, tables += kWordFloats;
    }
    if (end < group_end) add_word<true>(s0, s1, s2, s3, w0, w1, w2, w3, tables);
    add_scaled(results[0], tile_scales(task, tile, group), s0),
        add_scaled(results[1], tile_scales(task, tile + 1, group), s1);
    add_scaled(results[2], tile_scales(task, tile + 2, group), s2),
        add_scaled(results[3], tile_scales(task, tile + 3, group), s3);
  }
  finish<T>(task, row, tile, results[0]), finish<T>(task, row, tile + 1, results[1]);
  finish<T>(task, row, tile + 2, results[2]), finish<T>(task, row, tile + 3, results[3]);
}

template <class T>
void multiply(const Task& task, int64_t begin, const T* x) {
  const BinaryWeightMatmulParams& p = task.p;
  const Scratch<float> tables(std::min(kRows, p.m) * task.words * kWordFloats);
  int64_t row = 0;
  for (; row + kRows <= p.m; row += kRows) {
    for (int64_t r = 0; r < kRows; ++r) build_tables(x + (row + r) * p.k, p.k, kRows, tables + r * kFourFloats);
    for (int64_t tile = begin; tile < task.end; ++tile) block<T>(task, row, tile, tables);
  }
  for (; row < p.m; ++row) {
    build_tables(x + row * p.k, p.k, 1, tables);
    for (int64_t tile = begin; tile < task.end; tile += kTiles) single<T>(task, row, tile, tables);
  }
}

}  // namespace

void binary_weight_matmul_tiles_avx2(const BinaryWeightMatmulParams& p, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  const int64_t group_words = p.group_size > 0 ? p.group_size / 32 : words;
  const Task task{p, words, ceil_div(words, group_words), group_words, end};
  with_dtype(p.dtype, p.x, [&](const auto* x) { multiply(task, begin, x); });
}

}  // namespace bitmill::detail
