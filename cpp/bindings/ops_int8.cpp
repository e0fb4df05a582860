// SPDX-License-Identifier: Apache-2.0
// CPU op of the int8 family. Schema: python/bitmill/ops/int8.py.
#include "int8_rows.h"

namespace bitmill {
namespace {

std::tuple<Tensor, Tensor> int8_quantize_cpu(Tensor x) {
  const char* op = "int8_quantize";
  const Int8Rows q = int8_rows(op, rows_of(op, x));
  return {q.values, q.scale};
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) { m.impl("int8_quantize", TORCH_BOX(&bitmill::int8_quantize_cpu)); }
