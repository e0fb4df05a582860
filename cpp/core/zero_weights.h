// SPDX-License-Identifier: Apache-2.0
// Weights of 1 bit of which some are 0, with kernels for weights of which none is. Tiles without a zero are multiplied
// as if there were none anywhere. For products to integers the others are the mean of two weights: one has -1 where
// they are 0, one +1.
#pragma once

#include <algorithm>
#include <vector>

#include "layout.h"

namespace bitmill::detail {

inline constexpr int64_t kZeroTiles = 8, kZeroRows = 128;  // that are multiplied twice together

// Whether a weight of the tile is 0. nonzero: tiles [n, k].
static inline bool has_zero_weights(const int32_t* nonzero, int64_t n, int64_t k, int64_t tile) {
  const int64_t words = word_count(k), rows = n - tile * kTileRows < kTileRows ? n - tile * kTileRows : kTileRows;
  const int32_t* word = nonzero + tile * words * kTileRows;
  for (int64_t w = 0; w < words; ++w, word += kTileRows) {
    const uint32_t columns = k - 32 * w >= 32 ? ~0u : (1u << (k - 32 * w)) - 1;
    uint32_t all = ~0u;
    for (int64_t row = 0; row < rows; ++row) all &= static_cast<uint32_t>(word[row]);
    if ((all & columns) != columns) return true;
  }
  return false;
}

struct TwoWeights {
  std::vector<int32_t> lower, upper;  // `count` tiles, from `begin` on

  TwoWeights(const int32_t* weight, const int32_t* nonzero, int64_t k, int64_t begin, int64_t count) {
    const int64_t words = word_count(k), first = begin * words * kTileRows, all = count * words * kTileRows;
    lower.resize(static_cast<size_t>(all)), upper.resize(lower.size());
    for (int64_t i = 0; i < all; ++i) {
      const int64_t columns = k - 32 * (i / kTileRows % words);
      const uint32_t inside = columns >= 32 ? ~0u : (1u << columns) - 1;
      lower[i] = weight[first + i] & nonzero[first + i];
      upper[i] = static_cast<int32_t>(static_cast<uint32_t>(weight[first + i] | ~nonzero[first + i]) & inside);
    }
  }
};

// Calls run(first, last, zeros) for tiles [first, last) of [begin, end) that all have zeros, or all none.
template <class Run>
void for_runs_of_zeros(const int32_t* nonzero, int64_t n, int64_t k, int64_t begin, int64_t end, const Run& run) {
  if (!nonzero) return run(begin, end, false);
  const auto zeros_in = [&](int64_t tile) { return has_zero_weights(nonzero, n, k, tile); };
  for (int64_t first = begin, last; first < end; first = last) {
    const bool zeros = zeros_in(first);
    for (last = first + 1; last < end && zeros_in(last) == zeros;) ++last;
    run(first, last, zeros);
  }
}

// The same with at most kZeroTiles tiles that have zeros.
template <class Plain, class Twice>
void for_zero_weights(const int32_t* nonzero, int64_t n, int64_t k, int64_t begin, int64_t end, const Plain& plain,
                      const Twice& twice) {
  for_runs_of_zeros(nonzero, n, k, begin, end, [&](int64_t first, int64_t last, bool zeros) {
    if (!zeros) return plain(first, last);
    for (; first < last; first += kZeroTiles) twice(first, std::min(first + kZeroTiles, last));
  });
}

}  // namespace bitmill::detail
