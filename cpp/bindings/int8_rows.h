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

// Rounding of rows to int8; where to is the caller's.
inline Int8QuantizeParams int8_rows(const char* op, const Rows& rows) {
  Int8QuantizeParams p;
  p.x = rows.x.const_data_ptr();
  p.dtype = float_dtype(op, rows.x);
  p.m = rows.m;
  p.k = rows.k;
  p.parallel_for = torch_parallel_for;
  return p;
}

}  // namespace bitmill
