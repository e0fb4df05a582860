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

// The bits of word w of a row that are among its k columns.
static inline uint32_t columns_of_word(int64_t k, int64_t w) {
  return k - 32 * w >= 32 ? ~0u : (1u << (k - 32 * w)) - 1;
}

// Whether a weight of the tile is 0. nonzero: tiles [n, k].
static inline bool has_zero_weights(const int32_t* nonzero, int64_t n, int64_t k, int64_t tile) {
  const int64_t words = word_count(k), rows = std::min(kTileRows, n - tile * kTileRows);
  const int32_t* word = nonzero + tile * words * kTileRows;
  for (int64_t w = 0; w < words; ++w, word += kTileRows) {
    const uint32_t columns = columns_of_word(k, w);
    for (int64_t row = 0; row < rows; ++row) {
      if (columns & ~static_cast<uint32_t>(word[row])) return true;
    }
  }
  return false;
}

struct TwoWeights {
  std::vector<int32_t> lower, upper;  // `count` tiles, from `begin` on

  TwoWeights(const int32_t* weight, const int32_t* nonzero, int64_t k, int64_t begin, int64_t count) {
    const int64_t words = word_count(k), first = begin * words * kTileRows, all = count * words * kTileRows;
    lower.resize(static_cast<size_t>(all)), upper.resize(lower.size());
    for (int64_t i = 0; i < all; ++i) {
      const auto sign = static_cast<uint32_t>(weight[first + i]), present = static_cast<uint32_t>(nonzero[first + i]);
      lower[i] = static_cast<int32_t>(sign & present);
      upper[i] = static_cast<int32_t>((sign | ~present) & columns_of_word(k, i / kTileRows % words));
    }
  }
};

// Tiles [begin, end): plain(first, last) for runs without a zero, twice(first, last) for at most kZeroTiles with zeros.
template <class Plain, class Twice>
void for_zero_weights(const int32_t* nonzero, int64_t n, int64_t k, int64_t begin, int64_t end, const Plain& plain,
                      const Twice& twice) {
  if (!nonzero) return plain(begin, end);
  for (int64_t first = begin, last; first < end; first = last) {
    const bool zeros = has_zero_weights(nonzero, n, k, first);
    const int64_t most = zeros ? std::min(first + kZeroTiles, end) : end;
    for (last = first + 1; last < most && has_zero_weights(nonzero, n, k, last) == zeros;) ++last;
    zeros ? twice(first, last) : plain(first, last);
  }
}

}  // namespace bitmill::detail
