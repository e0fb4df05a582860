// SPDX-License-Identifier: Apache-2.0
// Rows of a table of bits as floats: what an embedding reads.
#pragma once

#include <cstdint>

#include "floats.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

struct BinaryEmbeddingParams {
  const int64_t* ids = nullptr;             // [m], each in [0, rows)
  const int32_t* weight = nullptr;          // tiles (layout.h) of [rows, k]
  const int32_t* weight_nonzero = nullptr;  // the same, or null: no entry is 0
  int64_t m = 0, rows = 0, k = 0;
  const void* scale = nullptr;  // [rows, groups] of `dtype`
  int64_t group_size = 0;       // columns a group, a multiple of 32; 0: one group
  void* out = nullptr;          // [m, k] of `dtype`: scale * (-1, 0 or +1)
  Dtype dtype = Dtype::f32;
  ParallelFor parallel_for = serial_for;
};
Status binary_embedding(const BinaryEmbeddingParams& params);  // bad_size for an id outside
BinaryEmbeddingParams rows_of(BinaryEmbeddingParams params, int64_t begin, int64_t end);
double nanoseconds_per_row(const BinaryEmbeddingParams& params);

namespace detail {
// Ids [begin, end).
void binary_embedding_rows_generic(const BinaryEmbeddingParams& params, int64_t begin, int64_t end);
void binary_embedding_rows_avx2(const BinaryEmbeddingParams& params, int64_t begin, int64_t end);
void binary_embedding_rows_avx512(const BinaryEmbeddingParams& params, int64_t begin, int64_t end);
}  // namespace detail

}  // namespace bitmill
