// SPDX-License-Identifier: Apache-2.0
// CPU op of the int8 family. Schema: python/bitmill/ops/int8.py.
#include "checks.h"
#include "int8.h"

namespace bitmill {
namespace {

std::tuple<Tensor, Tensor> int8_quantize_cpu(Tensor x) {
  const char* op = "int8_quantize";
  const Rows rows = rows_of(op, x);
  Int8QuantizeParams p;
  p.dtype = float_dtype(op, rows.x);
  const Tensor q = new_tensor(rows.x, sizes_of(rows.x), ScalarType::Char);
  const Tensor scale = new_tensor(rows.x, rows.leading, ScalarType::Float);
  p.x = rows.x.const_data_ptr();
  p.m = rows.m;
  p.k = rows.k;
  p.q = mutable_data<int8_t>(q);
  p.scale = mutable_data<float>(scale);
  p.parallel_for = torch_parallel_for;
  require(op, int8_quantize(p));
  return {q, scale};
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) { m.impl("int8_quantize", TORCH_BOX(&bitmill::int8_quantize_cpu)); }
