// SPDX-License-Identifier: Apache-2.0
// The casts of the fp4 family, for every device: check, allocate, call. A Device is a call of an op on one: it checks
// tensors, makes new ones, and runs core's function or its kernel.
#pragma once

#include <string>
#include <tuple>

#include "codebook4.h"
#include "fp4_arguments.h"
#include "nvfp4.h"

namespace bitmill {

template <class Device>
struct Fp4Casts {
  static Tensor fp4_cast(Tensor x, std::string format, std::string nan, std::string rounding, int64_t seed,
                         int64_t offset) {
    const char* op = "fp4_cast";
    const Device device(op, "x", x);
    Fp4CastParams p;
    p.format = format_of(op, format);
    p.nan = nan_policy_of(op, nan);
    p.rounding = rounding_of(op, rounding);
    p.random = stream_of(seed, offset);
    const Rows rows = read(op, x, p);
    const Tensor packed = device.new_tensor(with_last(rows.leading, ceil_div(rows.k, 2)), ScalarType::Byte);
    p.packed = mutable_data<uint8_t>(packed);
    const Status status = device.run(p);
    if (p.nan == NanPolicy::error && status == Status::bad_argument) {
      fail(op,
           ": x must not have a NaN with nan=\"error\", got at least one; remove it, or pass nan=\"max\" or "
           "\"zero\"");
    }
    device.require(status);
    return packed;
  }

  static Tensor fp4_uncast(Tensor packed, int64_t k, std::string format) {
    const char* op = "fp4_uncast";
    const Device device(op, "packed", packed);
    const Fp4Format kind = format_of(op, format);
    const Rows rows = packed_rows(op, device, packed, k);
    const Tensor values = device.new_tensor(with_last(rows.leading, k), ScalarType::Float);
    device.require(device.fp4_uncast(data<uint8_t>(rows.x), rows.m, k, kind, mutable_data<float>(values)));
    return values;
  }

  static Tensor e8m0_cast(Tensor x, std::string rounding) {
    const char* op = "e8m0_cast";
    const Device device(op, "x", x);
    if (rounding != "down" && rounding != "up") {
      fail(op, ": rounding must be \"down\" or \"up\", got \"", rounding, "\"");
    }
    const Dtype dtype = float_dtype(op, x);
    const Tensor values = as_contiguous(x);
    const Tensor codes = device.new_tensor(sizes_of(x), ScalarType::Byte);
    device.require(device.e8m0_cast(values.const_data_ptr(), dtype, values.numel(), rounding == "up",
                                    mutable_data<uint8_t>(codes)));
    return codes;
  }

  static Tensor e8m0_uncast(Tensor codes) {
    const Device device("e8m0_uncast", "codes", codes);
    const Tensor bytes = device.checked("codes", codes, ScalarType::Byte, sizes_of(codes));
    const Tensor values = device.new_tensor(sizes_of(codes), ScalarType::Float);
    device.require(device.e8m0_uncast(data<uint8_t>(bytes), bytes.numel(), mutable_data<float>(values)));
    return values;
  }

  static std::tuple<Tensor, Tensor> mxfp4_quantize(Tensor x, std::string scale_rule, std::string rounding, int64_t seed,
                                                   int64_t offset) {
    const char* op = "mxfp4_quantize";
    const Device device(op, "x", x);
    Mxfp4QuantizeParams p;
    p.rule = scale_rule_of(op, scale_rule);
    p.rounding = rounding_of(op, rounding);
    p.random = stream_of(seed, offset);
    return quantize_blocks(op, device, x, kMxBlock, p);
  }

  static Tensor mxfp4_dequantize(Tensor packed, Tensor scale, int64_t k) {
    const char* op = "mxfp4_dequantize";
    const Device device(op, "packed", packed);
    const Rows rows = packed_rows(op, device, packed, k);
    const Tensor bytes =
        device.checked("scale", scale, ScalarType::Byte, with_last(rows.leading, ceil_div(k, kMxBlock)));
    const Tensor values = device.new_tensor(with_last(rows.leading, k), ScalarType::Float);
    device.require(
        device.mxfp4_dequantize(data<uint8_t>(rows.x), data<uint8_t>(bytes), rows.m, k, mutable_data<float>(values)));
    return values;
  }

  static std::tuple<Tensor, Tensor> nvfp4_quantize(Tensor x, std::optional<Tensor> global_scale, std::string rounding,
                                                   int64_t seed, int64_t offset) {
    const char* op = "nvfp4_quantize";
    const Device device(op, "x", x);
    const auto global = device.checked("global_scale", global_scale, ScalarType::Float, {});
    Nvfp4QuantizeParams p;
    p.global_scale = data_or_null<float>(global);
    p.rounding = rounding_of(op, rounding);
    p.random = stream_of(seed, offset);
    return quantize_blocks(op, device, x, kNvBlock, p);
  }

  static Tensor nvfp4_dequantize(Tensor packed, Tensor scale, int64_t k, std::optional<Tensor> global_scale) {
    const char* op = "nvfp4_dequantize";
    const Device device(op, "packed", packed);
    const Rows rows = packed_rows(op, device, packed, k);
    const Tensor bytes =
        device.checked("scale", scale, ScalarType::Byte, with_last(rows.leading, ceil_div(k, kNvBlock)));
    const auto global = device.checked("global_scale", global_scale, ScalarType::Float, {});
    const Tensor values = device.new_tensor(with_last(rows.leading, k), ScalarType::Float);
    Nvfp4DequantizeParams p;
    p.packed = data<uint8_t>(rows.x);
    p.scale = data<uint8_t>(bytes);
    p.m = rows.m;
    p.k = k;
    p.global_scale = data_or_null<float>(global);
    p.values = mutable_data<float>(values);
    device.require(device.run(p));
    return values;
  }

  static std::tuple<Tensor, Tensor> codebook4_quantize(Tensor x, Tensor codebook, int64_t group_size,
                                                       std::string rounding, int64_t seed, int64_t offset) {
    const char* op = "codebook4_quantize";
    const Device device(op, "x", x);
    if (rounding != "nearest" && rounding != "stochastic") {
      fail(op, ": rounding must be \"nearest\" or \"stochastic\", got \"", rounding, "\"");
    }
    Codebook4QuantizeParams p;
    const Rows rows = read(op, x, p);
    const int64_t groups = group_count(op, rows.k, group_size, kFp4GroupMultiple);
    const Tensor table = device.checked("codebook", codebook, ScalarType::Float, {16});
    p.codebook = data<float>(table);
    p.group_size = group_size;
    p.stochastic = rounding == "stochastic";
    p.random = stream_of(seed, offset);
    const Tensor packed = device.new_tensor(with_last(rows.leading, ceil_div(rows.k, 2)), ScalarType::Byte);
    const Tensor scale = device.new_tensor(with_last(rows.leading, groups), ScalarType::Float);
    p.packed = mutable_data<uint8_t>(packed);
    p.scale = mutable_data<float>(scale);
    device.require(device.run(p));
    return {packed, scale};
  }

  static Tensor codebook4_dequantize(Tensor packed, Tensor scale, Tensor codebook, int64_t k, int64_t group_size) {
    const char* op = "codebook4_dequantize";
    const Device device(op, "packed", packed);
    const Rows rows = packed_rows(op, device, packed, k);
    const int64_t groups = group_count(op, k, group_size, kFp4GroupMultiple);
    const Tensor table = device.checked("codebook", codebook, ScalarType::Float, {16});
    const Tensor factors = device.checked("scale", scale, ScalarType::Float, with_last(rows.leading, groups));
    const Tensor values = device.new_tensor(with_last(rows.leading, k), ScalarType::Float);
    Codebook4DequantizeParams p;
    p.packed = data<uint8_t>(rows.x);
    p.scale = data<float>(factors);
    p.codebook = data<float>(table);
    p.m = rows.m;
    p.k = k;
    p.group_size = group_size;
    p.values = mutable_data<float>(values);
    device.require(device.run(p));
    return values;
  }

 private:
  // x as rows, which `params` reads.
  template <class Params>
  static Rows read(const char* op, const Tensor& x, Params& params) {
    const Rows rows = any_rows_of(op, x);
    params.x = rows.x.const_data_ptr();
    params.dtype = float_dtype(op, rows.x);
    params.m = rows.m;
    params.k = params.row_stride = rows.k;
    return rows;
  }

  // The rows of bytes of a packed tensor for k codes each.
  static Rows packed_rows(const char* op, const Device& device, const Tensor& packed, int64_t k) {
    const Rows rows = any_rows_of(op, packed);
    if (k < 0 || k > kMaxColumns || rows.k != ceil_div(k, 2)) {
      fail(op, ": packed must have ceil(k / 2) bytes in its last dimension, got k = ", k, " and ", rows.k, " bytes");
    }
    device.check("packed", packed, ScalarType::Byte, sizes_of(packed));
    return rows;
  }

  template <class Params>
  static std::tuple<Tensor, Tensor> quantize_blocks(const char* op, const Device& device, const Tensor& x,
                                                    int64_t width, Params& p) {
    const Rows rows = read(op, x, p);
    const Tensor packed = device.new_tensor(with_last(rows.leading, ceil_div(rows.k, 2)), ScalarType::Byte);
    const Tensor scale = device.new_tensor(with_last(rows.leading, ceil_div(rows.k, width)), ScalarType::Byte);
    p.packed = mutable_data<uint8_t>(packed);
    p.scale = mutable_data<uint8_t>(scale);
    device.require(device.run(p));
    return {packed, scale};
  }
};

}  // namespace bitmill

// The rows of the table of ops.
#define BITMILL_FP4_CASTS(library, Device)                                                                 \
  library.impl("fp4_cast", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::fp4_cast));                     \
  library.impl("fp4_uncast", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::fp4_uncast));                 \
  library.impl("e8m0_cast", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::e8m0_cast));                   \
  library.impl("e8m0_uncast", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::e8m0_uncast));               \
  library.impl("mxfp4_quantize", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::mxfp4_quantize));         \
  library.impl("mxfp4_dequantize", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::mxfp4_dequantize));     \
  library.impl("nvfp4_quantize", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::nvfp4_quantize));         \
  library.impl("nvfp4_dequantize", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::nvfp4_dequantize));     \
  library.impl("codebook4_quantize", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::codebook4_quantize)); \
  library.impl("codebook4_dequantize", BITMILL_BOX(bitmill::Fp4Casts<bitmill::Device>::codebook4_dequantize))
