// SPDX-License-Identifier: Apache-2.0
// One new token's attention, for every instruction set: dot products in 16 sums side by side, then halves onto halves;
// everything else from the first token to the last; a product and a sum are two roundings.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "decode_attention.h"
#include "scratch.h"

namespace bitmill::detail {

// x cos + (-x2, x1) sin, of halves x1 and x2.
template <class Set>
static void turn(const DecodeAttentionParams& p, const float* x, float* out) {
  const int64_t half = p.d / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    out[i] = first * p.cos[i] + -second * p.sin[i];
    out[half + i] = second * p.cos[half + i] + first * p.sin[half + i];
  }
}

// Set::dot(a, b, d), and Set::add_scaled(values, factor, d, sums): sums += factor * values.
template <class Set>
static void decode_attention_heads(const DecodeAttentionParams& p, int64_t begin, int64_t end) {
  const int64_t shared = p.heads / p.key_heads, tokens = p.position + 1;
  Scratch<float> query(p.d), weights(tokens);
  for (int64_t head = begin; head < end; ++head) {
    float* keys = p.keys + head * p.capacity * p.d;
    float* values = p.values + head * p.capacity * p.d;
    turn<Set>(p, p.rows + (p.heads + head) * p.d, keys + p.position * p.d);
    std::copy_n(p.rows + (p.heads + p.key_heads + head) * p.d, p.d, values + p.position * p.d);
    for (int64_t q = head * shared; q < (head + 1) * shared; ++q) {
      turn<Set>(p, p.rows + q * p.d, query.get());
      float most = -std::numeric_limits<float>::infinity(), total = 0.0f;
      for (int64_t t = 0; t < tokens; ++t) {
        const float score = Set::dot(query.get(), keys + t * p.d, p.d) * p.scaling;
        weights[t] = score;
        most = std::max(most, score);
      }
      float* context = p.out + q * p.d;
      std::fill_n(context, p.d, 0.0f);
      for (int64_t t = 0; t < tokens; ++t) {
        const float weight = std::exp(weights[t] - most);
        total += weight;
        Set::add_scaled(values + t * p.d, weight, p.d, context);
      }
      for (int64_t i = 0; i < p.d; ++i) context[i] /= total;
    }
  }
}

}  // namespace bitmill::detail
