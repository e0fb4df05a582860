// SPDX-License-Identifier: Apache-2.0
// The obvious form of one token's attention, and the choice of the instruction set.
#include "decode_attention.h"

#include "cpu.h"
#include "decode_attention_heads.h"

namespace bitmill {
namespace detail {
namespace {

struct Generic {
  static float dot(const float* a, const float* b, int64_t d) {
    float sums[16] = {};
    for (int64_t i = 0; i < d; ++i) sums[i % 16] += a[i] * b[i];
    for (int64_t half = 8; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
  }
  static void add_scaled(const float* values, float factor, int64_t d, float* sums) {
    for (int64_t i = 0; i < d; ++i) sums[i] += factor * values[i];
  }
};

}  // namespace

void decode_attention_heads_generic(const DecodeAttentionParams& p, int64_t begin, int64_t end) {
  decode_attention_heads<Generic>(p, begin, end);
}

namespace {

auto* choose_kernel() {
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) return decode_attention_heads_avx2;
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) return decode_attention_heads_avx512;
#endif
  return decode_attention_heads_generic;
}

}  // namespace
}  // namespace detail

Status decode_attention(const DecodeAttentionParams& p) {
  if (p.heads < 0 || p.key_heads < 0 || p.d < 0 || p.position < 0 || p.position >= p.capacity) return Status::bad_size;
  if (p.heads == 0 || p.d == 0) return Status::ok;
  if (p.key_heads == 0 || p.heads % p.key_heads != 0 || p.d % 2 != 0) return Status::bad_argument;
  auto* heads = detail::choose_kernel();
  const double cost = static_cast<double>(p.heads / p.key_heads * (p.position + 1)) * (10.0 + 0.1 * p.d);
  split(p.parallel_for, p.key_heads, cost, [&](int64_t begin, int64_t end) { heads(p, begin, end); });
  return Status::ok;
}

}  // namespace bitmill
