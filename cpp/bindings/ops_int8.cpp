// SPDX-License-Identifier: Apache-2.0
// CPU op of the int8 family. Schema: python/bitmill/ops/int8.py.
#include "boxing.h"
#include "int8_rows.h"

namespace bitmill {
namespace {

std::tuple<Tensor, Tensor> int8_quantize_cpu(Tensor x) {
  const char* op = "int8_quantize";
  const Rows rows = rows_of(op, x);
  const Tensor q = new_tensor(sizes_of(rows.x), ScalarType::Char), scale = new_tensor(rows.leading, ScalarType::Float);
  Int8QuantizeParams p = int8_rows(op, rows);
  p.q = mutable_data<int8_t>(q);
  p.scale = mutable_data<float>(scale);
  require(op, int8_quantize(p));
  return {q, scale};
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) { m.impl("int8_quantize", BITMILL_BOX(bitmill::int8_quantize_cpu)); }
