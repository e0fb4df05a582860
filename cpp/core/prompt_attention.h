// SPDX-License-Identifier: Apache-2.0
// Attention of the tokens of a prompt to themselves and all before them, in floats, with the cache of keys and values
// that decode_attention goes on with.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "status.h"

namespace bitmill {

struct PromptAttentionParams {
  const float* rows = nullptr;  // [m, (heads + 2 key_heads) d]: queries, keys and values of the new tokens
  const float* cos = nullptr;   // [m, d], of their places: queries and keys are turned by it, halves against halves
  const float* sin = nullptr;   // [m, d]
  float* keys = nullptr;        // [key_heads, capacity, d]; those of the new tokens are written from `position` on
  float* values = nullptr;      // the same
  int64_t m = 0, heads = 0, key_heads = 0, d = 0;
  int64_t capacity = 0, position = 0;
  float scaling = 1.0f;
  float* out = nullptr;  // [m, heads d]
  ParallelFor parallel_for = serial_for;

  int64_t tokens() const { return position + m; }
  int64_t width() const { return (heads + 2 * key_heads) * d; }
};
Status prompt_attention(const PromptAttentionParams& params);

namespace detail {
// What one instruction set does. Keys are laid out once for all queries, and the queries come in blocks of `rows`.
struct PromptKernel {
  int64_t rows, lanes;  // `lanes` keys side by side, and as many columns of values
  void (*lay_out)(const PromptAttentionParams& params, float* keys, int64_t begin, int64_t end);  // key heads
  // Blocks of queries, those of one head after those of another. values: rows of whole lanes.
  void (*attend)(const PromptAttentionParams& params, const float* keys, const float* values, int64_t begin,
                 int64_t end);
};
PromptKernel prompt_attention_generic();
PromptKernel prompt_attention_avx2();
PromptKernel prompt_attention_avx512();
}  // namespace detail

}  // namespace bitmill
