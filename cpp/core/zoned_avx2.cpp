// SPDX-License-Identifier: Apache-2.0
// The zoned product by decoding: a weight is one of 4 values of its output and block, which two bits choose (8 with
// split salient columns). Sums by lookup, as with AVX-512, would take three lookups a column, more than a
// multiplication costs here. The weights of 16 outputs become a panel for all rows, 4 rows at a time; for a single row
// they are multiplied where they are decoded. The sum of an output runs over the columns in their stored order either
// way.
#include <algorithm>

#include "avx2.h"
#include "layout.h"
#include "scratch.h"
#include "zoned.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kRows = 4;              // rows side by side
constexpr int64_t kBlockRows = 128;       // rows that share a panel
constexpr int64_t kColumns = 128;         // of a panel: 8 KiB
constexpr int64_t kPrefetchBytes = 1024;  // how far ahead a single row asks for its bits

struct Pair {  // of a tile: its outputs 0-7 and 8-15
  __m256 low = _mm256_setzero_ps(), high = low;
};

// What the two bits of a weight mean for 8 outputs: [second][first].
struct Values {
  __m256 v00, v01, v10, v11;

  // By the highest bits of `first` and `second`.
  [[gnu::always_inline]] __m256 choose(__m256 first, __m256 second) const {
    return _mm256_blendv_ps(_mm256_blendv_ps(v00, v10, second), _mm256_blendv_ps(v01, v11, second), first);
  }
};

// The scales of 8 outputs and a block, one after the other, as values.
struct Scales {
  const ZonedWeight& w;
  int64_t at;

  __m256 next() {
    const int64_t here = at;
    at += kTileRows;
    if (w.scale_dtype == Dtype::f32) return load8(static_cast<const float*>(w.scale) + here);
    return load8(static_cast<const Float16*>(w.scale) + here);
  }
  Pair zone() {  // mu - alpha and mu + alpha
    const __m256 mean = w.centred ? next() : _mm256_set1_ps(-0.0f), alpha = next();
    return {_mm256_sub_ps(mean, alpha), _mm256_add_ps(mean, alpha)};
  }
  Values others() {
    const Pair concentrated = zone(), sparse = zone();
    return {concentrated.low, concentrated.high, sparse.low, sparse.high};
  }
  Values salient() {
    const Pair first = zone();
    const __m256 beta = next();
    return {_mm256_sub_ps(first.low, beta), _mm256_sub_ps(first.high, beta), _mm256_add_ps(first.low, beta),
            _mm256_add_ps(first.high, beta)};
  }
};

struct Task {
  const ZonedMatmulParams& p;
  const ZonedPlan& plan;
  int64_t words;
};

// Bits of 16 outputs, shifted to the highest bits of the lanes. g++ would make masks of them, which blends do without.
[[gnu::always_inline]] inline Pair bits_of(const int32_t* word, __m128i shift) {
  const auto eight = [&](const int32_t* words) {
    const __m256i bits = load_bits(words);
    __m256 high = _mm256_castsi256_ps(_mm256_sll_epi32(bits, shift));
    settle(high);
    return high;
  };
  return {eight(word), eight(word + 8)};
}

// Calls use(place, where its word is, shift for its bits) for the places [begin, end).
template <class Use>
[[gnu::always_inline]] inline void for_each_place(int64_t begin, int64_t end, const Use& use) {
  for (int64_t place = begin; place < end;) {
    const int64_t word = place / 32, stop = std::min(end, 32 * (word + 1));
    for (int left = 31 - static_cast<int>(place % 32); place < stop; ++place, --left) {
      use(place, word * kTileRows, _mm_cvtsi32_si128(left));
    }
  }
}

// Calls put(place, weights of the tile's outputs) for the places [begin, end) of a block.
template <bool split, class Put>
[[gnu::always_inline]] inline void decode(const Task& task, int64_t tile, int64_t block, int64_t begin, int64_t end,
                                          const Put& put) {
  const ZonedWeight& w = task.p.weight;
  const ZonedBlock& b = task.plan.blocks[block];
  const int32_t *sign = w.sign + tile * task.words * kTileRows, *zone = w.zone + tile * task.words * kTileRows;
  const int64_t scale = (tile * static_cast<int64_t>(task.plan.blocks.size()) + block) * w.scales() * kTileRows;
  Scales scales{w, scale}, high_scales{w, scale + 8};
  const Values others = scales.others(), high_others = high_scales.others();
  const int64_t middle = std::clamp(b.salient, begin, end);
  if (begin < middle) {
    const Values salient = scales.salient(), high_salient = high_scales.salient();
    const Values sparse = split ? scales.salient() : salient,
                 high_sparse = split ? high_scales.salient() : high_salient;
    const int32_t* zones = split ? w.salient_zone + tile * w.salient_zone_words * kTileRows : nullptr;
    for_each_place(b.first + begin, b.first + middle, [&](int64_t place, int64_t word, __m128i shift) {
      const Pair first = bits_of(sign + word, shift), second = bits_of(zone + word, shift);
      Pair weights{salient.choose(first.low, second.low), high_salient.choose(first.high, second.high)};
      if constexpr (split) {
        const int64_t column = b.split_first + place - b.first;
        const __m128i left = _mm_cvtsi32_si128(31 - static_cast<int>(column % 32));
        const Pair part = bits_of(zones + column / 32 * kTileRows, left);
        weights.low = _mm256_blendv_ps(weights.low, sparse.choose(first.low, second.low), part.low);
        weights.high = _mm256_blendv_ps(weights.high, high_sparse.choose(first.high, second.high), part.high);
      }
      put(place, weights);
    });
  }
  for_each_place(b.first + middle, b.first + end, [&](int64_t place, int64_t word, __m128i shift) {
    const Pair first = bits_of(sign + word, shift), second = bits_of(zone + word, shift);
    put(place, Pair{others.choose(first.low, second.low), high_others.choose(first.high, second.high)});
  });
}

template <class T>
void finish(const ZonedMatmulParams& p, T* out, int64_t column, __m256 value) {
  const int64_t count = std::min<int64_t>(p.weight.n - column, 8);
  if (count <= 0) return;
  float bias[8] = {};
  T part[8];
  if (p.bias) std::copy_n(p.bias + column, count, bias);
  if (p.bias) value = _mm256_add_ps(value, _mm256_loadu_ps(bias));
  store8(part, value);
  std::copy_n(part, count, out + column);
}

void finish(const ZonedMatmulParams& p, int64_t row, int64_t tile, Pair result) {
  with_dtype(p.dtype, p.out, [&](auto* out) {
    finish(p, out + row * p.weight.n, tile * kTileRows, result.low);
    finish(p, out + row * p.weight.n, tile * kTileRows + 8, result.high);
  });
}

// One row, in stored order, times a tile.
template <bool split>
void single(const Task& task, int64_t row, int64_t tile, const float* x) {
  const int64_t blocks = static_cast<int64_t>(task.plan.blocks.size());
  const ZonedWeight& w = task.p.weight;
  Pair sums;
  for (int64_t block = 0; block < blocks; ++block) {
    const ZonedBlock& b = task.plan.blocks[block];
    for (int64_t word = b.first / 32; 32 * word < b.first + b.columns; ++word) {
      for (const int32_t* plane : {w.sign, w.zone}) {
        const int32_t* at = plane + (tile * task.words + word) * kTileRows;
        _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes, _MM_HINT_T0);
      }
    }
    decode<split>(task, tile, block, 0, b.columns, [&](int64_t place, Pair weights) {
      const __m256 value = _mm256_broadcast_ss(x + place);
      sums.low = _mm256_fmadd_ps(weights.low, value, sums.low);
      sums.high = _mm256_fmadd_ps(weights.high, value, sums.high);
    });
  }
  finish(task.p, row, tile, sums);
}

// 4 rows, side by side, times a panel.
[[gnu::noinline]] void multiply_panel(const float* x, int64_t columns, const float* panel, Pair* sums) {
  Pair s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
  const auto add = [](Pair& s, Pair w, const float* value) {
    const __m256 v = _mm256_broadcast_ss(value);
    s.low = _mm256_fmadd_ps(w.low, v, s.low);
    s.high = _mm256_fmadd_ps(w.high, v, s.high);
  };
  for (int64_t i = 0; i < columns; ++i, x += kRows, panel += kTileRows) {
    const Pair w{_mm256_load_ps(panel), _mm256_load_ps(panel + 8)};
    add(s0, w, x), add(s1, w, x + 1), add(s2, w, x + 2), add(s3, w, x + 3);
  }
  sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

// `rows` rows, 4 side by side, times a tile.
template <bool split>
void many(const Task& task, int64_t row, int64_t rows, int64_t tile, const float* x) {
  alignas(32) float panel[kColumns * kTileRows];
  Pair sums[kBlockRows];
  const int64_t k = task.p.weight.k, blocks = static_cast<int64_t>(task.plan.blocks.size());
  for (int64_t block = 0; block < blocks; ++block) {
    const ZonedBlock& b = task.plan.blocks[block];
    for (int64_t begin = 0; begin < b.columns; begin += kColumns) {
      const int64_t end = std::min(b.columns, begin + kColumns);
      float* at = panel;
      decode<split>(task, tile, block, begin, end, [&](int64_t, Pair weights) {
        _mm256_store_ps(at, weights.low);
        _mm256_store_ps(at + 8, weights.high);
        at += kTileRows;
      });
      for (int64_t r = 0; r < rows; r += kRows) {
        multiply_panel(x + r * k + (b.first + begin) * kRows, end - begin, panel, sums + r);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) finish(task.p, row + r, tile, sums[r]);
}

template <bool split, class T>
void multiply(const Task& task, int64_t begin, int64_t end, const T* x) {
  const ZonedMatmulParams& p = task.p;
  const ZonedWeight& w = p.weight;
  Scratch<float> scale(w.k, 1);
  for (int64_t i = 0; w.column_scale && i < w.k; ++i) {
    with_dtype(w.scale_dtype, w.column_scale, [&](const auto* s) { scale[i] = to_float(s[task.plan.order[i]]); });
  }
  // Rows in stored order, `side` side by side.
  Scratch<float> stored(w.k * (p.m == 1 ? 1 : std::min(kBlockRows, ceil_div(p.m, kRows) * kRows)));
  const auto store_row = [&](int64_t row, float* to, int64_t side) {
    for (int64_t i = 0; i < w.k; ++i) to[i * side] = to_float(x[row * w.k + task.plan.order[i]]) * scale[i];
  };
  if (p.m == 1) {
    store_row(0, stored, 1);
    for (int64_t tile = begin; tile < end; ++tile) single<split>(task, 0, tile, stored);
    return;
  }
  for (int64_t row = 0; row < p.m; row += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, p.m - row);
    for (int64_t r = 0; r < rows; ++r) store_row(row + r, stored + r / kRows * kRows * w.k + r % kRows, kRows);
    for (int64_t tile = begin; tile < end; ++tile) many<split>(task, row, rows, tile, stored);
  }
}

}  // namespace

void zoned_tiles_avx2(const ZonedMatmulParams& p, const ZonedPlan& plan, int64_t begin, int64_t end) {
  const Task task{p, plan, word_count(p.weight.k)};
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    p.weight.split ? multiply<true>(task, begin, end, x) : multiply<false>(task, begin, end, x);
  });
}

}  // namespace bitmill::detail
