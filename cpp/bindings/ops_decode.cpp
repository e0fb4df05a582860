// SPDX-License-Identifier: Apache-2.0
// The CPU ops of generation: check, allocate, call. Schemas: python/bitmill/ops/decode_attention.py.
#include "boxing.h"
#include "checks.h"
#include "decode_attention.h"
#include "prompt_attention.h"

namespace bitmill {
namespace {

// The arguments of both ops, checked: `tokens` new ones, or as many as there are rows. cos and sin: [d] or [m, d].
struct CacheArguments {
  int64_t m, heads, key_heads, capacity, d;
  Tensor rows, cos, sin;

  CacheArguments(const char* op, const Tensor& x, const Tensor& cosine, const Tensor& sine, const Tensor& keys,
                 const Tensor& values, int64_t position, bool single) {
    const Sizes cache = sizes_of(keys);
    if (cache.size() != 3) fail(op, ": keys must have shape [key heads, capacity, d], got ", to_string(cache));
    key_heads = cache[0], capacity = cache[1], d = cache[2];
    if (key_heads == 0 || d == 0 || d % 2 != 0) {
      fail(op, ": keys must have heads of an even size, got ", to_string(cache));
    }
    const int64_t width = x.dim() > 0 ? x.size(x.dim() - 1) : 0;
    heads = width / d - 2 * key_heads;
    if (width % d != 0 || heads <= 0 || heads % key_heads != 0) {
      fail(op, ": rows must hold a multiple of ", key_heads, " queries, ", key_heads, " keys and ", key_heads,
           " values of ", d, " columns, got ", width, " columns");
    }
    m = single ? 1 : x.size(0);
    rows = checked(op, "rows", x, ScalarType::Float, {m, width});
    const Sizes places = single ? Sizes{d} : Sizes{m, d};
    cos = checked(op, "cos", cosine, ScalarType::Float, places);
    sin = checked(op, "sin", sine, ScalarType::Float, places);
    check(op, "keys", keys, ScalarType::Float, cache);
    check(op, "values", values, ScalarType::Float, cache);
    const auto check_contiguous = [&](const char* name, const Tensor& t) {
      if (!t.is_contiguous()) fail(op, ": ", name, " must be contiguous, since it is written in place");
    };
    check_contiguous("keys", keys);
    check_contiguous("values", values);
    if (m > capacity || position < 0 || position > capacity - m) {
      fail(op, ": position must be between 0 and ", capacity - m, ", got ", position);
    }
  }

  // To Params, but for m.
  template <class Params>
  Params params(const Tensor& keys, const Tensor& values, int64_t position, double scaling, const Tensor& out) const {
    Params p;
    p.rows = data<float>(rows);
    p.cos = data<float>(cos);
    p.sin = data<float>(sin);
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
    return p;
  }
};

Tensor decode_attention_cpu(Tensor rows, Tensor cos, Tensor sin, Tensor keys, Tensor values, int64_t position,
                            double scaling) {
  const char* op = "decode_attention";
  const CacheArguments a(op, rows, cos, sin, keys, values, position, true);
  const Tensor out = new_tensor({1, a.heads * a.d}, ScalarType::Float);
  require(op, decode_attention(a.params<DecodeAttentionParams>(keys, values, position, scaling, out)));
  return out;
}

Tensor prompt_attention_cpu(Tensor rows, Tensor cos, Tensor sin, Tensor keys, Tensor values, int64_t position,
                            double scaling) {
  const char* op = "prompt_attention";
  const CacheArguments a(op, rows, cos, sin, keys, values, position, false);
  const Tensor out = new_tensor({a.m, a.heads * a.d}, ScalarType::Float);
  auto p = a.params<PromptAttentionParams>(keys, values, position, scaling, out);
  p.m = a.m;
  require(op, prompt_attention(p));
  return out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("decode_attention", BITMILL_BOX(bitmill::decode_attention_cpu));
  m.impl("prompt_attention", BITMILL_BOX(bitmill::prompt_attention_cpu));
}
