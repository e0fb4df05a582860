// SPDX-License-Identifier: Apache-2.0
// The arguments of products with FP4 weights, for every device. A Call checks tensors of one: CpuCall or CudaCall.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "fp4_arguments.h"
#include "fp4_matmul.h"

namespace bitmill {

// A weight and what it owns: the contiguous tensors and the table that the pointers lead to.
struct WeightArguments {
  Tensor tiles, scale;
  std::optional<Tensor> codebook, global_scale;
  Fp4Table table;

  Fp4Weight weight(int64_t n, int64_t k, int64_t group_size) const {
    Fp4Weight w;
    w.tiles = data<int32_t>(tiles);
    w.n = n;
    w.k = k;
    w.table = codebook ? data<float>(*codebook) : table.value;
    const bool bytes = scale.scalar_type() == ScalarType::Byte;
    w.scale = bytes ? nullptr : data<float>(scale);
    w.scale_bytes = bytes ? data<uint8_t>(scale) : nullptr;
    w.global_scale = data_or_null<float>(global_scale);
    w.group_size = group_size;
    return w;
  }
};

template <class Call>
WeightArguments weight_arguments(const Call& call, const char* op, const Tensor& weight, const Tensor& scale, int64_t n,
                                 int64_t k, const std::string& format, int64_t group_size,
                                 const std::optional<Tensor>& codebook, const std::optional<Tensor>& global_scale) {
  const Fp4Table table = table_of(op, format);
  const int64_t groups = group_count(op, k, group_size, kFp4GroupMultiple);
  const ScalarType dtype = scale.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Byte) {
    fail(op, ": scale must be float32, or uint8 for E8M0, got ", dtype_name(dtype));
  }
  if (global_scale && dtype != ScalarType::Byte) {
    fail(op, ": scale must be uint8, E4M3, with a global_scale, got ", dtype_name(dtype));
  }
  const Tensor scales = call.checked("scale", scale, dtype, {n, groups});
  const Tensor tiles = call.checked("weight", weight, ScalarType::Int, tile_sizes(n, k, 4),
                                    "; pack the weight with bitmill.ops.tile_pack");
  return {tiles, scales, call.checked("codebook", codebook, ScalarType::Float, {16}),
          call.checked("global_scale", global_scale, ScalarType::Float, {}), table};
}

// The table, on the host, as integers whose sums with int8 activations are within int32.
inline Fp4Integers checked_integers(const char* op, const float* table, int64_t group_size, int64_t k) {
  Fp4Integers integers;
  if (!fp4_integers(table, integers)) {
    fail(op,
         ": the values of codes must be integers of magnitude up to 127 times a power of two for"
         " activations=\"int8\", got others; move their common factor to scale, or pass activations=\"float\"");
  }
  const int64_t most = fp4_int8_columns(integers);
  const int64_t width = group_size > 0 ? std::min(group_size, k) : k;
  if (width > most) {
    fail(op, ": a group must have at most ", most, " columns for activations=\"int8\" and these values, got ", width,
         "; pass a smaller group_size, or activations=\"float\"");
  }
  return integers;
}

inline Fp4Activations activations_of(const char* op, const std::string& format) {
  if (format == "mxfp4") return Fp4Activations::mxfp4;
  if (format == "nvfp4") return Fp4Activations::nvfp4;
  if (format == "e2m1" || format == "e1m2") return Fp4Activations::fpq;
  fail(op, ": activations must be \"e2m1\", \"e1m2\", \"mxfp4\" or \"nvfp4\", got \"", format, "\"");
}

// Rows as 4-bit floats to q int8 [m, k] and row_scale float32 [m, groups]; how input_scale is read is the caller's.
struct ActivationArguments {
  Fp4ActivationsParams p;
  std::optional<Tensor> scale, shift;

  template <class Call>
  ActivationArguments(const Call& call, const char* op, const Rows& rows, const std::string& format,
                      const std::optional<Tensor>& input_scale, const std::optional<Tensor>& input_shift,
                      const std::string& scale_rule) {
    p.kind = activations_of(op, format);
    p.rule = scale_rule_of(op, scale_rule);
    p.dtype = float_dtype(op, rows.x);
    p.x = rows.x.const_data_ptr();
    p.m = rows.m;
    p.k = rows.k;
    p.parallel_for = torch_parallel_for;
    const bool fpq = p.kind == Fp4Activations::fpq;
    if (fpq != input_scale.has_value()) {
      fail(op, ": input_scale must ", fpq ? "be given" : "be None", " for activations \"", format, "\"");
    }
    if (input_shift && !fpq) fail(op, ": input_shift must be None for activations \"", format, "\"");
    if (fpq) p.format = format_of(op, format);
    scale = call.checked("input_scale", input_scale, ScalarType::Float, {});
    shift = call.checked("input_shift", input_shift, ScalarType::Byte, {rows.k});
    p.shift = data_or_null<uint8_t>(shift);
  }

  // Columns that share a scale, 0 for all.
  int64_t width() const {
    return p.kind == Fp4Activations::fpq ? 0 : p.kind == Fp4Activations::mxfp4 ? kMxBlock : kNvBlock;
  }

  // A product multiplies groups of the same width.
  void check_group_size(const char* op, const std::string& format, int64_t group_size) const {
    if (group_size == width()) return;
    fail(op, ": group_size must be ", width(), " for activations \"", format, "\", got ", group_size);
  }
};

}  // namespace bitmill
