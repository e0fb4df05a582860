// SPDX-License-Identifier: Apache-2.0
// Packing rows, for instruction sets without masked loads: everything but the 32 values of one word.
#pragma once

#include <cstring>

#include "bitpack.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill::detail {

struct PackedWord {
  uint32_t sign = 0, nonzero = 0;
};

// Set::pack_word<levels>(x, shift, threshold, magnitudes) packs 32 readable values; `shift` and `magnitudes` may be
// null.
template <class Set, Levels levels, class T>
static void pack_rows(const BitpackParams& p, const T* x, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k), whole = p.k / 32, left = p.k % 32;
  // as much as mean_by_halves needs, and room to write the last word whole
  const Scratch<float> room(p.mean ? 2 * p.k + 32 : 0);
  float* const magnitudes = p.mean ? room.get() : nullptr;
  float last_shift[32] = {};
  if (p.shift && left > 0) std::memcpy(last_shift, p.shift + 32 * whole, static_cast<size_t>(left) * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    int64_t count = 0;
    const auto put = [&](int64_t w, PackedWord word) {
      p.sign[row * words + w] = static_cast<int32_t>(word.sign);
      if constexpr (levels == Levels::sign) p.nonzero[row * words + w] = static_cast<int32_t>(word.nonzero);
      count += __builtin_popcount(levels == Levels::sign ? word.nonzero : word.sign);
    };
    const auto magnitudes_at = [&](int64_t w) { return magnitudes ? magnitudes + 32 * w : nullptr; };
    for (int64_t w = 0; w < whole; ++w) {
      const float* shift = p.shift ? p.shift + 32 * w : nullptr;
      put(w, Set::template pack_word<levels>(input + 32 * w, shift, p.threshold, magnitudes_at(w)));
    }
    if (left > 0) {  // 1 to 31 columns: a padded copy, and no bits past k
      T last[32] = {};
      std::memcpy(last, input + 32 * whole, static_cast<size_t>(left) * sizeof(T));
      const PackedWord word = Set::template pack_word<levels>(last, last_shift, p.threshold, magnitudes_at(whole));
      const uint32_t columns = (1u << left) - 1;
      put(whole, {word.sign & columns, word.nonzero & columns});
    }
    if (p.count) p.count[row] = static_cast<int32_t>(count);
    if (magnitudes) p.mean[row] = mean_by_halves(magnitudes, p.k);
  }
}

template <class Set>
static void pack_rows(const BitpackParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    switch (p.levels) {
      case Levels::sign:
        return pack_rows<Set, Levels::sign>(p, x, begin, end);
      case Levels::plus:
        return pack_rows<Set, Levels::plus>(p, x, begin, end);
      case Levels::bool_:
        return pack_rows<Set, Levels::bool_>(p, x, begin, end);
    }
  });
}

}  // namespace bitmill::detail
