// SPDX-License-Identifier: Apache-2.0
// The obvious form of a prompt's attention, and the choice of the instruction set.
#include "prompt_attention.h"

#include <bit>
#include <cmath>
#include <optional>

#include "cpu.h"
#include "prompt_attention_blocks.h"

namespace bitmill {
namespace detail {
namespace {

float exponential(float x) {
  using E = Exponential;
  if (x < E::kLeast) return 0.0f;
  if (std::isnan(x)) return x;
  const float n = std::nearbyint(x * E::kLog2E);
  const float r = std::fma(-n, E::kRest, std::fma(-n, E::kLn2, x));
  float y = E::kFirst;
  for (const float c : E::kNext) y = std::fma(y, r, c);
  return std::bit_cast<float>(std::bit_cast<int32_t>(y) + static_cast<int32_t>(n) * (1 << 23));
}

struct Generic {
  using Vector = float;
  static constexpr int64_t kWidth = 1, kRows = 1;

  static float load(const float* x) { return *x; }
  static void store(float* out, float x) { *out = x; }
  static float broadcast(float x) { return x; }
  static float fma(float a, float b, float sum) { return std::fma(a, b, sum); }
  static void transpose(const float* from, int64_t, float* to, int64_t) { *to = *from; }

  static float softmax(float* scores, int64_t count) {
    float most = -std::numeric_limits<float>::infinity(), sums[16] = {};
    for (int64_t t = 0; t < count; ++t) most = std::max(most, scores[t]);
    for (int64_t t = 0; t < count; ++t) sums[t % 16] += scores[t] = exponential(scores[t] - most);
    for (int64_t half = 8; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
  }
};

PromptKernel choose_kernel() {
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) return prompt_attention_avx2();
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) return prompt_attention_avx512();
#endif
  return prompt_attention_generic();
}

// Keys and values of the new tokens to the cache.
void remember(const PromptAttentionParams& p, int64_t begin, int64_t end) {
  for (int64_t head = begin; head < end; ++head) {
    for (int64_t row = 0; row < p.m; ++row) {
      const int64_t at = (head * p.capacity + p.position + row) * p.d;
      const float* key = p.rows + row * p.width() + (p.heads + head) * p.d;
      turn(key, p.cos + row * p.d, p.sin + row * p.d, p.d, 1.0f, p.keys + at);
      std::copy_n(key + p.key_heads * p.d, p.d, p.values + at);
    }
  }
}

}  // namespace

PromptKernel prompt_attention_generic() { return kernel_of<Generic>(); }

}  // namespace detail

Status prompt_attention(const PromptAttentionParams& p) {
  if (p.m < 0 || p.heads < 0 || p.key_heads < 0 || p.d < 0 || p.position < 0) return Status::bad_size;
  if (p.m > p.capacity || p.position > p.capacity - p.m) return Status::bad_size;
  if (p.m == 0 || p.heads == 0 || p.d == 0) return Status::ok;
  if (p.key_heads == 0 || p.heads % p.key_heads != 0 || p.d % 2 != 0) return Status::bad_argument;
  const detail::PromptKernel kernel = detail::choose_kernel();
  const int64_t tokens = p.tokens(), columns = ceil_div(p.d, kernel.lanes) * kernel.lanes;
  const detail::Scratch<float> keys(p.key_heads * ceil_div(tokens, kernel.lanes) * kernel.lanes * p.d);
  const bool whole = columns == p.d;
  const detail::Scratch<float> padded(whole ? 0 : p.key_heads * tokens * columns, 0.0f);
  split(p.parallel_for, p.key_heads, 0.5 * static_cast<double>(tokens * p.d), [&](int64_t begin, int64_t end) {
    detail::remember(p, begin, end);
    kernel.lay_out(p, keys, begin, end);
    for (int64_t i = begin * tokens; i < (whole ? 0 : end * tokens); ++i) {
      std::copy_n(p.values + (i / tokens * p.capacity + i % tokens) * p.d, p.d, padded + i * columns);
    }
  });
  const double cost = static_cast<double>(kernel.rows * (p.position + p.m / 2 + 1)) * (2.0 + 0.03 * p.d);
  split(p.parallel_for, p.heads * ceil_div(p.m, kernel.rows), cost,
        [&](int64_t begin, int64_t end) { kernel.attend(p, keys, whole ? p.values : padded.get(), begin, end); });
  return Status::ok;
}

}  // namespace bitmill
