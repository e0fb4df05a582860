// SPDX-License-Identifier: Apache-2.0
// Weights that one row of activations reads once, from memory, front to back: memory is read fastest from one place.
#pragma once

#include <cstdint>

#include "layout.h"

namespace bitmill::detail {

// How far ahead lines are asked for, to the second-level cache, and one line of each page: to translate an address that
// nobody has used lately takes several reads of the page table, which together last longer than that of a line.
inline constexpr int64_t kLinesAhead = 6 << 10, kPagesAhead = 256 << 10;
inline constexpr int64_t kPageWords = 4096 / (kTileRows * sizeof(int32_t));

// Whether one line of a page is to be asked for at this word of a tile.
[[gnu::always_inline]] static inline bool begins_page(int64_t word) { return word % kPageWords == 0; }
[[gnu::always_inline]] static inline void read_page_ahead(const int32_t* vector) {
  __builtin_prefetch(reinterpret_cast<const char*>(vector) + kPagesAhead, 0, 2);
}
[[gnu::always_inline]] static inline void read_ahead(const int32_t* vector) {
  __builtin_prefetch(reinterpret_cast<const char*>(vector) + kLinesAhead, 0, 2);
}

}  // namespace bitmill::detail
