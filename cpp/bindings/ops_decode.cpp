// SPDX-License-Identifier: Apache-2.0
// The CPU op of decoding: check, allocate, call. Schema: python/bitmill/ops/decode_attention.py.
#include "boxing.h"
#include "checks.h"
#include "decode_attention.h"

namespace bitmill {
namespace {

Tensor decode_attention_cpu(Tensor rows, Tensor cos, Tensor sin, Tensor keys, Tensor values, int64_t position,
                            double scaling) {
  const char* op = "decode_attention";
  const Sizes cache = sizes_of(keys);
  if (cache.size() != 3) fail(op, ": keys must have shape [key heads, capacity, d], got ", to_string(cache));
  const int64_t key_heads = cache[0], capacity = cache[1], d = cache[2];
  if (key_heads == 0 || d == 0 || d % 2 != 0) {
    fail(op, ": keys must have heads of an even size, got ", to_string(cache));
  }
  const int64_t width = rows.dim() > 0 ? rows.size(rows.dim() - 1) : 0, heads = width / d - 2 * key_heads;
  if (width % d != 0 || heads <= 0 || heads % key_heads != 0) {
    fail(op, ": rows must hold a multiple of ", key_heads, " queries, ", key_heads, " keys and ", key_heads,
         " values of ", d, " columns, got ", width, " columns");
  }
  const Tensor row = checked(op, "rows", rows, ScalarType::Float, {1, width});
  const Tensor cosine = checked(op, "cos", cos, ScalarType::Float, {d});
  const Tensor sine = checked(op, "sin", sin, ScalarType::Float, {d});
  check(op, "keys", keys, ScalarType::Float, cache);
  check(op, "values", values, ScalarType::Float, cache);
  const auto check_contiguous = [&](const char* name, const Tensor& t) {
    if (!t.is_contiguous()) fail(op, ": ", name, " must be contiguous, since it is written in place");
  };
  check_contiguous("keys", keys);
  check_contiguous("values", values);
  if (position < 0 || position >= capacity) {
    fail(op, ": position must be between 0 and ", capacity - 1, ", got ", position);
  }
  const Tensor out = new_tensor({1, heads * d}, ScalarType::Float);
  DecodeAttentionParams p;
  p.rows = data<float>(row);
  p.cos = data<float>(cosine);
  p.sin = data<float>(sine);
  p.keys = mutable_data<float>(keys);
  p.values = mutable_data<float>(values);
  p.heads = heads;
  p.key_heads = key_heads;
  p.d = d;
  p.capacity = capacity;
  p.position = position;
  p.scaling = static_cast<float>(scaling);
  p.out = mutable_data<float>(out);
  p.parallel_for = torch_parallel_for;
  require(op, decode_attention(p));
  return out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) { m.impl("decode_attention", BITMILL_BOX(bitmill::decode_attention_cpu)); }
