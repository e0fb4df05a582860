// SPDX-License-Identifier: Apache-2.0
// Activations of an op that may multiply them as int8.
#pragma once

#include "checks.h"
#include "int8.h"

namespace bitmill {

inline bool multiplies_int8(const char* op, const std::string& activations) {
  if (activations == "int8") return true;
  if (activations == "float") return false;
  fail(op, ": activations must be \"float\" or \"int8\", got \"", activations, "\"");
}

struct Int8Rows {
  Tensor values, scale;  // int8 [..., k], float32 [...]
};

inline Int8Rows int8_rows(const char* op, const Rows& rows) {
  Int8QuantizeParams p;
  p.dtype = float_dtype(op, rows.x);
  const Int8Rows q{new_tensor(rows.x, with_last(rows.leading, rows.k), ScalarType::Char),
                   new_tensor(rows.x, rows.leading, ScalarType::Float)};
  p.x = rows.x.const_data_ptr();
  p.m = rows.m;
  p.k = rows.k;
  p.q = mutable_data<int8_t>(q.values);
  p.scale = mutable_data<float>(q.scale);
  p.parallel_for = torch_parallel_for;
  require(op, int8_quantize(p));
  return q;
}

}  // namespace bitmill
