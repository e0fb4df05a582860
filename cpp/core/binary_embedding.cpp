// SPDX-License-Identifier: Apache-2.0
// The obvious form of binary_embedding, and the choice of the instruction set.
#include "binary_embedding.h"

#include <algorithm>

#include "binary_embedding_rows.h"
#include "cpu.h"
#include "layout.h"

namespace bitmill {
namespace detail {

void binary_embedding_rows_generic(const BinaryEmbeddingParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.out, [&]<class T>(T*) {
    const auto write = [](T* out, uint32_t signs, uint32_t nonzeros, T scale, int64_t columns) {
      T values[4];  // of -1, +1, and 0 twice
      const float level[] = {-1.0f, 1.0f, 0.0f, 0.0f};
      for (int i = 0; i < 4; ++i) store(to_float(scale) * level[i], values + i);
      for (int64_t j = 0; j < columns; ++j) out[j] = values[(~nonzeros >> j & 1u) << 1 | (signs >> j & 1u)];
    };
    for_each_word<T>(p, begin, end, write);
  });
}

}  // namespace detail

Status binary_embedding(const BinaryEmbeddingParams& p) {
  if (p.m < 0 || p.rows < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.group_size < 0 || p.group_size % 32 != 0) return Status::bad_argument;
  if (std::any_of(p.ids, p.ids + p.m, [&](int64_t id) { return id < 0 || id >= p.rows; })) return Status::bad_size;
  auto* rows = detail::binary_embedding_rows_generic;
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) rows = detail::binary_embedding_rows_avx2;
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) rows = detail::binary_embedding_rows_avx512;
#endif
  split(p.parallel_for, p.m, nanoseconds_per_row(p), [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  return Status::ok;
}

double nanoseconds_per_row(const BinaryEmbeddingParams& p) {
  const bool vectors = eight_lanes() || selected() == InstructionSet::avx512;
  return static_cast<double>(p.k) * (vectors ? 0.1 : 1.0);
}

BinaryEmbeddingParams rows_of(BinaryEmbeddingParams p, int64_t begin, int64_t end) {
  p.m = end - begin;
  p.ids += begin;
  p.out = static_cast<char*>(p.out) + begin * p.k * bytes_of(p.dtype);
  return p;
}

}  // namespace bitmill
