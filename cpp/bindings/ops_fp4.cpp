// SPDX-License-Identifier: Apache-2.0
// CPU ops of the fp4 family: check, allocate, call. Schemas: python/bitmill/ops/fp4.py.
#include "boxing.h"
#include "checks.h"
#include "fp4.h"
#include "fp4_activations.h"
#include "int8_rows.h"

namespace bitmill {
namespace {

Fp4Format format_of(const char* op, const std::string& format) {
  if (format == "e2m1") return kE2M1;
  if (format == "e1m2") return kE1M2;
  if (format == "e3m0") return kE3M0;
  fail(op, ": format must be \"e2m1\", \"e1m2\" or \"e3m0\", got \"", format, "\"");
}

NanPolicy nan_policy_of(const char* op, const std::string& nan) {
  if (nan == "max") return NanPolicy::max;
  if (nan == "zero") return NanPolicy::zero;
  if (nan == "error") return NanPolicy::error;
  fail(op, ": nan must be \"max\", \"zero\" or \"error\", got \"", nan, "\"");
}

ScaleRule scale_rule_of(const char* op, const std::string& rule) {
  if (rule == "floor") return ScaleRule::floor;
  if (rule == "rceil") return ScaleRule::rceil;
  if (rule == "ceil") return ScaleRule::ceil;
  if (rule == "even") return ScaleRule::even;
  fail(op, ": scale_rule must be \"floor\", \"rceil\", \"ceil\" or \"even\", got \"", rule, "\"");
}

Rounding rounding_of(const char* op, const std::string& rounding) {
  if (rounding == "nearest_even") return Rounding::nearest_even;
  if (rounding == "stochastic") return Rounding::stochastic;
  if (rounding == "toward_zero") return Rounding::toward_zero;
  if (rounding == "half_away") return Rounding::half_away;
  fail(op, ": rounding must be \"nearest_even\", \"stochastic\", \"toward_zero\" or \"half_away\", got \"", rounding,
       "\"");
}

RandomStream stream_of(int64_t seed, int64_t offset) {
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
}

Tensor fp4_cast_cpu(Tensor x, std::string format, std::string nan, std::string rounding, int64_t seed, int64_t offset) {
  const char* op = "fp4_cast";
  Fp4CastParams p;
  p.format = format_of(op, format);
  p.nan = nan_policy_of(op, nan);
  p.rounding = rounding_of(op, rounding);
  p.random = stream_of(seed, offset);
  const Rows rows = rows_of(op, x);
  const Tensor packed = new_tensor(with_last(rows.leading, ceil_div(rows.k, 2)), ScalarType::Byte);
  p.x = rows.x.const_data_ptr();
  p.dtype = float_dtype(op, rows.x);
  p.m = rows.m;
  p.k = p.row_stride = rows.k;
  p.packed = mutable_data<uint8_t>(packed);
  p.parallel_for = torch_parallel_for;
  const Status status = fp4_cast(p);
  if (p.nan == NanPolicy::error && status == Status::bad_argument) {
    fail(op,
         ": x must not have a NaN with nan=\"error\", got at least one; remove it, or pass nan=\"max\" or "
         "\"zero\"");
  }
  require(op, status);
  return packed;
}

// The rows of bytes of a packed tensor for k codes each.
Rows packed_rows(const char* op, const Tensor& packed, int64_t k) {
  const Rows rows = rows_of(op, packed);
  if (k < 0 || k > kMaxColumns || rows.k != ceil_div(k, 2)) {
    fail(op, ": packed must have ceil(k / 2) bytes in its last dimension, got k = ", k, " and ", rows.k, " bytes");
  }
  checked(op, "packed", packed, ScalarType::Byte, sizes_of(packed));
  return rows;
}

Tensor fp4_uncast_cpu(Tensor packed, int64_t k, std::string format) {
  const char* op = "fp4_uncast";
  const Fp4Format kind = format_of(op, format);
  const Rows rows = packed_rows(op, packed, k);
  const Tensor values = new_tensor(with_last(rows.leading, k), ScalarType::Float);
  require(op, fp4_uncast(data<uint8_t>(rows.x), rows.m, k, kind, mutable_data<float>(values), torch_parallel_for));
  return values;
}

Tensor e8m0_cast_cpu(Tensor x, std::string rounding) {
  const char* op = "e8m0_cast";
  if (rounding != "down" && rounding != "up") {
    fail(op, ": rounding must be \"down\" or \"up\", got \"", rounding, "\"");
  }
  const Dtype dtype = float_dtype(op, x);
  const Tensor values = as_contiguous(x);
  const Tensor codes = new_tensor(sizes_of(x), ScalarType::Byte);
  require(op,
          e8m0_cast(values.const_data_ptr(), dtype, values.numel(), rounding == "up", mutable_data<uint8_t>(codes)));
  return codes;
}

Tensor e8m0_uncast_cpu(Tensor codes) {
  const Tensor bytes = checked("e8m0_uncast", "codes", codes, ScalarType::Byte, sizes_of(codes));
  const Tensor values = new_tensor(sizes_of(codes), ScalarType::Float);
  require("e8m0_uncast", e8m0_uncast(data<uint8_t>(bytes), bytes.numel(), mutable_data<float>(values)));
  return values;
}

std::tuple<Tensor, Tensor> mxfp4_quantize_cpu(Tensor x, std::string scale_rule, std::string rounding, int64_t seed,
                                              int64_t offset) {
  const char* op = "mxfp4_quantize";
  Mxfp4QuantizeParams p;
  p.rule = scale_rule_of(op, scale_rule);
  p.rounding = rounding_of(op, rounding);
  p.random = stream_of(seed, offset);
  const Rows rows = rows_of(op, x);
  const Tensor packed = new_tensor(with_last(rows.leading, ceil_div(rows.k, 2)), ScalarType::Byte);
  const Tensor scale = new_tensor(with_last(rows.leading, ceil_div(rows.k, kMxBlock)), ScalarType::Byte);
  p.x = rows.x.const_data_ptr();
  p.dtype = float_dtype(op, rows.x);
  p.m = rows.m;
  p.k = p.row_stride = rows.k;
  p.packed = mutable_data<uint8_t>(packed);
  p.scale = mutable_data<uint8_t>(scale);
  p.parallel_for = torch_parallel_for;
  require(op, mxfp4_quantize(p));
  return {packed, scale};
}

Tensor mxfp4_dequantize_cpu(Tensor packed, Tensor scale, int64_t k) {
  const char* op = "mxfp4_dequantize";
  const Rows rows = packed_rows(op, packed, k);
  const Tensor bytes = checked(op, "scale", scale, ScalarType::Byte, with_last(rows.leading, ceil_div(k, kMxBlock)));
  const Tensor values = new_tensor(with_last(rows.leading, k), ScalarType::Float);
  require(op, mxfp4_dequantize(data<uint8_t>(rows.x), data<uint8_t>(bytes), rows.m, k, mutable_data<float>(values),
                               torch_parallel_for));
  return values;
}

Fp4Table table_of(const char* op, const std::string& format) {
  if (format == "nf4") return kNf4;
  if (format == "bnb-fp4") return kBnbFp4;
  if (format == "e2m1" || format == "e1m2" || format == "e3m0") return fp4_table(format_of(op, format));
  fail(op, ": format must be \"e2m1\", \"e1m2\", \"e3m0\", \"nf4\" or \"bnb-fp4\", got \"", format, "\"");
}

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

WeightArguments weight_arguments(const char* op, const Tensor& weight, const Tensor& scale, int64_t n, int64_t k,
                                 const std::string& format, int64_t group_size, const std::optional<Tensor>& codebook,
                                 const std::optional<Tensor>& global_scale) {
  const Fp4Table table = table_of(op, format);
  if (group_size < 0 || group_size % 8 != 0) {
    fail(op, ": group_size must be 0 or a positive multiple of 8, got ", group_size);
  }
  const ScalarType dtype = scale.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Byte) {
    fail(op, ": scale must be float32, or uint8 for E8M0, got ", dtype_name(dtype));
  }
  if (global_scale && dtype != ScalarType::Byte) {
    fail(op, ": scale must be uint8, E4M3, with a global_scale, got ", dtype_name(dtype));
  }
  const Tensor scales = checked(op, "scale", scale, dtype, {n, group_size > 0 ? ceil_div(k, group_size) : 1});
  const Tensor tiles = checked(op, "weight", weight, ScalarType::Int, tile_sizes(n, k, 4),
                               "; pack the weight with bitmill.ops.tile_pack");
  return {tiles, scales, checked(op, "codebook", codebook, ScalarType::Float, {16}),
          checked(op, "global_scale", global_scale, ScalarType::Float, {}), table};
}

void check_integers(const char* op, const Fp4Weight& weight) {
  Fp4Integers integers;
  if (!fp4_integers(weight.table, integers)) {
    fail(op,
         ": the values of codes must be integers of magnitude up to 127 times a power of two for"
         " activations=\"int8\", got others; move their common factor to scale, or pass activations=\"float\"");
  }
  const int64_t most = fp4_int8_columns(integers);
  const int64_t width = weight.group_size > 0 ? std::min(weight.group_size, weight.k) : weight.k;
  if (width > most) {
    fail(op, ": a group must have at most ", most, " columns for activations=\"int8\" and these values, got ", width,
         "; pass a smaller group_size, or activations=\"float\"");
  }
}

Tensor fp4_linear_cpu(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, std::string format,
                      int64_t group_size, std::optional<Tensor> codebook, std::string activations,
                      std::optional<Tensor> global_scale) {
  const char* op = "fp4_linear";
  const bool int8 = multiplies_int8(op, activations);
  const Rows rows = rows_of(op, x);
  const Dtype dtype = float_dtype(op, rows.x);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  const WeightArguments arguments =
      weight_arguments(op, weight, scale, n, k, format, group_size, codebook, global_scale);
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  Fp4MatmulParams p;
  p.weight = arguments.weight(n, k, group_size);
  if (int8) check_integers(op, p.weight);
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  const auto q = scratch<int8_t>(int8 ? rows.m * k : 0);
  const auto row_scale = scratch<float>(int8 ? rows.m : 0);
  if (int8) require(op, int8_quantize(int8_rows(op, rows, q.get(), row_scale.get())));
  p.x = int8 ? q.get() : rows.x.const_data_ptr();
  p.row_scale = int8 ? row_scale.get() : nullptr;
  p.dtype = dtype;
  p.m = rows.m;
  p.bias = data_or_null<float>(bias_row);
  p.out = out.mutable_data_ptr();
  p.parallel_for = torch_parallel_for;
  require(op, fp4_matmul(p));
  return out;
}

Fp4Activations activations_of(const char* op, const std::string& format) {
  if (format == "mxfp4") return Fp4Activations::mxfp4;
  if (format == "nvfp4") return Fp4Activations::nvfp4;
  if (format == "e2m1" || format == "e1m2") return Fp4Activations::fpq;
  fail(op, ": activations must be \"e2m1\", \"e1m2\", \"mxfp4\" or \"nvfp4\", got \"", format, "\"");
}

// Rows as 4-bit floats to q int8 [m, k] and row_scale float32 [m, groups].
struct ActivationArguments {
  Fp4ActivationsParams p;
  std::optional<Tensor> shift;

  ActivationArguments(const char* op, const Rows& rows, const std::string& format, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& shifts, const std::string& scale_rule) {
    p.kind = activations_of(op, format);
    p.rule = scale_rule_of(op, scale_rule);
    p.dtype = float_dtype(op, rows.x);
    p.x = rows.x.const_data_ptr();
    p.m = rows.m;
    p.k = rows.k;
    p.parallel_for = torch_parallel_for;
    const bool fpq = p.kind == Fp4Activations::fpq;
    if (fpq != scale.has_value()) {
      fail(op, ": input_scale must ", fpq ? "be given" : "be None", " for activations \"", format, "\"");
    }
    if (shifts && !fpq) fail(op, ": input_shift must be None for activations \"", format, "\"");
    if (!fpq) return;
    p.format = format_of(op, format);
    p.scale = *data<float>(checked(op, "input_scale", *scale, ScalarType::Float, {}));
    shift = checked(op, "input_shift", shifts, ScalarType::Byte, {rows.k});
    p.shift = data_or_null<uint8_t>(shift);
  }

  void run(const char* op, int8_t* q, float* row_scale) {
    p.q = q;
    p.row_scale = row_scale;
    const Status status = fp4_activations(p);
    if (status == Status::bad_argument) {
      fail(op, ": input_shift must be at most ", (1 << p.format.exponent_bits) - 1, " for this format, got more");
    }
    require(op, status);
  }
};

std::tuple<Tensor, Tensor> fp4_activations_cpu(Tensor x, std::string format, std::optional<Tensor> input_scale,
                                               std::optional<Tensor> input_shift, std::string scale_rule) {
  const char* op = "fp4_activations";
  const Rows rows = rows_of(op, x);
  ActivationArguments arguments(op, rows, format, input_scale, input_shift, scale_rule);
  const Tensor q = new_tensor(sizes_of(x), ScalarType::Char);
  const Tensor row_scale = new_tensor(with_last(rows.leading, arguments.p.groups()), ScalarType::Float);
  arguments.run(op, mutable_data<int8_t>(q), mutable_data<float>(row_scale));
  return {q, row_scale};
}

Tensor fp4_fp4_linear_cpu(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, std::string format,
                          int64_t group_size, std::optional<Tensor> global_scale, std::string activations,
                          std::optional<Tensor> input_scale, std::optional<Tensor> input_shift,
                          std::string scale_rule) {
  const char* op = "fp4_fp4_linear";
  const Rows rows = rows_of(op, x);
  ActivationArguments casting(op, rows, activations, input_scale, input_shift, scale_rule);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  const bool grouped = casting.p.kind != Fp4Activations::fpq;
  const int64_t width = casting.p.kind == Fp4Activations::mxfp4 ? kMxBlock : kNvBlock;
  if (group_size != (grouped ? width : 0)) {
    fail(op, ": group_size must be ", grouped ? width : 0, " for activations \"", activations, "\", got ", group_size);
  }
  const WeightArguments arguments =
      weight_arguments(op, weight, scale, n, k, format, group_size, std::nullopt, global_scale);
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  Fp4MatmulParams p;
  p.weight = arguments.weight(n, k, group_size);
  check_integers(op, p.weight);
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  const auto q = scratch<int8_t>(rows.m * k);
  const auto row_scale = scratch<float>(rows.m * casting.p.groups());
  casting.run(op, q.get(), row_scale.get());
  p.x = q.get();
  p.dtype = casting.p.dtype;
  p.m = rows.m;
  p.row_scale = row_scale.get();
  p.grouped_rows = grouped;
  p.bias = data_or_null<float>(bias_row);
  p.out = out.mutable_data_ptr();
  p.parallel_for = torch_parallel_for;
  require(op, fp4_matmul(p));
  return out;
}

Tensor fp4_weight_cpu(Tensor weight, Tensor scale, int64_t n, int64_t k, std::string format, int64_t group_size,
                      std::optional<Tensor> codebook, std::optional<Tensor> global_scale) {
  const char* op = "fp4_weight";
  if (n < 0 || k < 0 || k > kMaxColumns)
    fail(op, ": n must be at least 0 and k between 0 and 16777216, got n = ", n, ", k = ", k);
  const WeightArguments arguments =
      weight_arguments(op, weight, scale, n, k, format, group_size, codebook, global_scale);
  const Tensor values = new_tensor({n, k}, ScalarType::Float);
  require(op, fp4_weight(arguments.weight(n, k, group_size), mutable_data<float>(values), torch_parallel_for));
  return values;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("fp4_cast", BITMILL_BOX(bitmill::fp4_cast_cpu));
  m.impl("fp4_uncast", BITMILL_BOX(bitmill::fp4_uncast_cpu));
  m.impl("e8m0_cast", BITMILL_BOX(bitmill::e8m0_cast_cpu));
  m.impl("e8m0_uncast", BITMILL_BOX(bitmill::e8m0_uncast_cpu));
  m.impl("mxfp4_quantize", BITMILL_BOX(bitmill::mxfp4_quantize_cpu));
  m.impl("mxfp4_dequantize", BITMILL_BOX(bitmill::mxfp4_dequantize_cpu));
  m.impl("fp4_linear", BITMILL_BOX(bitmill::fp4_linear_cpu));
  m.impl("fp4_weight", BITMILL_BOX(bitmill::fp4_weight_cpu));
  m.impl("fp4_activations", BITMILL_BOX(bitmill::fp4_activations_cpu));
  m.impl("fp4_fp4_linear", BITMILL_BOX(bitmill::fp4_fp4_linear_cpu));
}
