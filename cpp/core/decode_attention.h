// SPDX-License-Identifier: Apache-2.0
// Attention of one new token to itself and all before it, in floats, with the cache of keys and values: what a language
// model decodes with. A token is too little work for a handful of calls.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "status.h"

namespace bitmill {

struct DecodeAttentionParams {
  const float* rows = nullptr;  // [(heads + 2 key_heads) d]: the queries, keys and values of the new token
  const float* cos = nullptr;   // [d], of its place: queries and keys are turned by it, halves against halves
  const float* sin = nullptr;   // [d]
  float* keys = nullptr;        // [key_heads, capacity, d]; those of the new token are written at `position`
  float* values = nullptr;      // the same
  int64_t heads = 0, key_heads = 0, d = 0;
  int64_t capacity = 0, position = 0;
  float scaling = 1.0f;
  float* out = nullptr;  // [heads d]
  ParallelFor parallel_for = serial_for;
};
Status decode_attention(const DecodeAttentionParams& params);

namespace detail {
// Key heads [begin, end), with the queries that share them.
void decode_attention_heads_generic(const DecodeAttentionParams& params, int64_t begin, int64_t end);
void decode_attention_heads_avx2(const DecodeAttentionParams& params, int64_t begin, int64_t end);
void decode_attention_heads_avx512(const DecodeAttentionParams& params, int64_t begin, int64_t end);
}  // namespace detail

}  // namespace bitmill
