// SPDX-License-Identifier: Apache-2.0
// What the instruction sets share of binary_embedding: which words and which scale make each 32 values of a row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "binary_embedding.h"
#include "layout.h"

namespace bitmill::detail {

inline constexpr int64_t kRowsAhead = 2;  // a vocabulary does not fit into the caches

// write(out, signs, nonzeros, scale, columns) for every word of the rows of ids [begin, end).
template <class T, class Write>
static inline void for_each_word(const BinaryEmbeddingParams& p, int64_t begin, int64_t end, const Write& write) {
  const int64_t words = word_count(p.k),
                group_words = p.group_size > 0 ? p.group_size / 32 : std::max<int64_t>(words, 1);
  const int64_t groups = p.group_size > 0 ? ceil_div(p.k, p.group_size) : 1;
  const auto first_word = [&](int64_t row) { return row / kTileRows * words * kTileRows + row % kTileRows; };
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.ids[i], lane = first_word(row);
    const T* scale = static_cast<const T*>(p.scale) + row * groups;
    T* out = static_cast<T*>(p.out) + i * p.k;
    const int64_t ahead = first_word(p.ids[std::min(i + kRowsAhead, end - 1)]);
    for (int64_t w = 0; w < words; ++w) {
      __builtin_prefetch(p.weight + ahead + w * kTileRows);
      const int64_t at = lane + w * kTileRows;
      const uint32_t nonzeros = p.weight_nonzero ? static_cast<uint32_t>(p.weight_nonzero[at]) : ~0u;
      write(out + 32 * w, static_cast<uint32_t>(p.weight[at]), nonzeros, scale[w / group_words],
            std::min<int64_t>(32, p.k - 32 * w));
    }
  }
}

}  // namespace bitmill::detail
