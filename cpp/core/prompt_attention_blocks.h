// SPDX-License-Identifier: Apache-2.0
// A prompt's attention, for every instruction set. A score is a chain of fused multiply-adds over d, a context one over
// the tokens, both from first to last; the sum of the weights is 16 sums side by side, then halves onto halves.
#pragma once

#include <algorithm>
#include <limits>

#include "layout.h"
#include "prompt_attention.h"
#include "scratch.h"

namespace bitmill::detail {

// exp(x) for x <= 0 to a relative 2e-7: 2^n times a polynomial of r = x - n ln 2. What is below the least is 0.
struct Exponential {
  static constexpr float kLeast = -86.0f, kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f, kRest = -0x1.05c610p-29f;
  static constexpr float kFirst = 1.0f / 720, kNext[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
};

// (x cos + (-x2, x1) sin) factor, of halves x1 and x2.
static inline void turn(const float* x, const float* cos, const float* sin, int64_t d, float factor, float* out) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    out[i] = (first * cos[i] + -second * sin[i]) * factor;
    out[half + i] = (second * cos[half + i] + first * sin[half + i]) * factor;
  }
}

// Set: Vector of kWidth floats; load, store, broadcast, fma(a, b, sum); kRows queries together; softmax(scores, count),
// which makes weights of scores, 0 up to a multiple of 16, and answers their sum; transpose(from, stride, to,
// to_stride) of kWidth x kWidth floats.

// Keys of a head: [tiles][d][kLanes], zeros past the last token.
template <class Set>
static void lay_out(const PromptAttentionParams& p, float* out, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = Set::kWidth, kLanes = 2 * kWidth;
  const int64_t tokens = p.tokens(), tiles = ceil_div(tokens, kLanes);
  for (int64_t head = begin; head < end; ++head) {
    const float* keys = p.keys + head * p.capacity * p.d;
    for (int64_t token = 0; token < tiles * kLanes; token += kWidth) {
      float* to = out + (head * tiles + token / kLanes) * p.d * kLanes + token % kLanes;
      int64_t i = 0;
      if (token + kWidth <= tokens) {
        for (; i + kWidth <= p.d; i += kWidth) Set::transpose(keys + token * p.d + i, p.d, to + i * kLanes, kLanes);
      }
      for (; i < p.d; ++i) {
        for (int64_t lane = 0; lane < kWidth; ++lane) {
          to[i * kLanes + lane] = token + lane < tokens ? keys[(token + lane) * p.d + i] : 0.0f;
        }
      }
    }
  }
}

// Scores of kRows queries [kRows][d] with a tile of keys, to [kRows][stride].
template <class Set>
static void score(const float* query, const float* keys, int64_t d, float* out, int64_t stride) {
  using Vector = typename Set::Vector;
  Vector sum[Set::kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < Set::kRows; ++r) sum[r][0] = sum[r][1] = Set::broadcast(0.0f);
  for (int64_t i = 0; i < d; ++i) {
    const Vector low = Set::load(keys + 2 * i * Set::kWidth), high = Set::load(keys + (2 * i + 1) * Set::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < Set::kRows; ++r) {
      const Vector q = Set::broadcast(query[r * d + i]);
      sum[r][0] = Set::fma(q, low, sum[r][0]);
      sum[r][1] = Set::fma(q, high, sum[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Set::kRows; ++r) {
    Set::store(out + r * stride, sum[r][0]);
    Set::store(out + r * stride + Set::kWidth, sum[r][1]);
  }
}

// Contexts of kRows queries, kLanes columns, of the tokens that all of them see; row r, which sees r tokens more, goes
// on alone. weight: [kRows][stride]. values: [tokens][columns].
template <class Set>
static void gather(const float* weight, int64_t stride, const float* values, int64_t columns, int64_t tokens,
                   int64_t rows, float* out) {
  using Vector = typename Set::Vector;
  constexpr int64_t kWidth = Set::kWidth;
  Vector sum[Set::kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < Set::kRows; ++r) sum[r][0] = sum[r][1] = Set::broadcast(0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    const Vector low = Set::load(values + t * columns), high = Set::load(values + t * columns + kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < Set::kRows; ++r) {
      const Vector w = Set::broadcast(weight[r * stride + t]);
      sum[r][0] = Set::fma(w, low, sum[r][0]);
      sum[r][1] = Set::fma(w, high, sum[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Set::kRows; ++r) {
    Set::store(out + 2 * r * kWidth, sum[r][0]);
    Set::store(out + (2 * r + 1) * kWidth, sum[r][1]);
  }
  for (int64_t r = 1; r < rows; ++r) {
    Vector low = Set::load(out + 2 * r * kWidth), high = Set::load(out + (2 * r + 1) * kWidth);
    for (int64_t t = tokens; t < tokens + r; ++t) {
      const Vector w = Set::broadcast(weight[r * stride + t]);
      low = Set::fma(w, Set::load(values + t * columns), low);
      high = Set::fma(w, Set::load(values + t * columns + kWidth), high);
    }
    Set::store(out + 2 * r * kWidth, low);
    Set::store(out + (2 * r + 1) * kWidth, high);
  }
}

template <class Set>
static void attend(const PromptAttentionParams& p, const float* keys, const float* values, int64_t begin, int64_t end) {
  constexpr int64_t kRows = Set::kRows, kLanes = 2 * Set::kWidth;
  const int64_t tiles = ceil_div(p.tokens(), kLanes), stride = ceil_div(tiles * kLanes, 16) * 16;
  const int64_t blocks = ceil_div(p.m, kRows), columns = ceil_div(p.d, kLanes) * kLanes;
  const int64_t held = columns == p.d ? p.capacity : p.tokens();  // rows of values a head
  Scratch<float> query(kRows * p.d), weight(kRows * stride), context(kRows * kLanes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / blocks, key_head = head / (p.heads / p.key_heads), first = item % blocks * kRows;
    const int64_t rows = std::min(kRows, p.m - first), common = p.position + first + 1;
    for (int64_t r = 0; r < kRows; ++r) {  // past the last row it is repeated
      const int64_t row = first + std::min(r, rows - 1);
      turn(p.rows + row * p.width() + head * p.d, p.cos + row * p.d, p.sin + row * p.d, p.d, p.scaling,
           query + r * p.d);
    }
    for (int64_t tile = 0; tile * kLanes < common + rows - 1; ++tile) {
      score<Set>(query, keys + (key_head * tiles + tile) * p.d * kLanes, p.d, weight + tile * kLanes, stride);
    }
    float total[kRows] = {};
    for (int64_t r = 0; r < rows; ++r) total[r] = Set::softmax(weight + r * stride, common + r);
    for (int64_t column = 0; column < p.d; column += kLanes) {
      gather<Set>(weight, stride, values + key_head * held * columns + column, columns, common, rows, context);
      for (int64_t r = 0; r < rows; ++r) {
        float* out = p.out + (first + r) * p.heads * p.d + head * p.d + column;
        for (int64_t i = 0; i < std::min(kLanes, p.d - column); ++i) out[i] = context[r * kLanes + i] / total[r];
      }
    }
  }
}

template <class Set>
static constexpr PromptKernel kernel_of() {
  return {Set::kRows, 2 * Set::kWidth, lay_out<Set>, attend<Set>};
}

}  // namespace bitmill::detail
