// SPDX-License-Identifier: Apache-2.0
// CUDA ops of the fp4 family: check, allocate, launch. Schemas: python/bitmill/ops/fp4_linear.py.
#include "boxing.h"
#include "cuda_call.h"
#include "fp4.h"

namespace bitmill {
namespace {

Fp4Table table_of(const char* op, const std::string& format) {
  if (format == "e2m1") return fp4_table(kE2M1);
  if (format == "e1m2") return fp4_table(kE1M2);
  if (format == "e3m0") return fp4_table(kE3M0);
  if (format == "nf4") return kNf4;
  if (format == "bnb-fp4") return kBnbFp4;
  fail(op, ": format must be \"e2m1\", \"e1m2\", \"e3m0\", \"nf4\" or \"bnb-fp4\", got \"", format, "\"");
}

Tensor fp4_linear_cuda(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, std::string format,
                       int64_t group_size, std::optional<Tensor> codebook, std::string activations,
                       std::optional<Tensor> global_scale) {
  const char* op = "fp4_linear";
  const CudaCall call(op, "x", x);
  call.require_float_activations(activations);
  const Rows rows = any_rows_of(op, x);
  const Fp4Table table = table_of(op, format);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  if (group_size < 0 || group_size % 8 != 0) {
    fail(op, ": group_size must be 0 or a positive multiple of 8, got ", group_size);
  }
  const ScalarType kind = scale.scalar_type();
  if (kind != ScalarType::Float && kind != ScalarType::Byte) {
    fail(op, ": scale must be float32, or uint8 for E8M0, got ", dtype_name(kind));
  }
  if (global_scale && kind != ScalarType::Byte) {
    fail(op, ": scale must be uint8, E4M3, with a global_scale, got ", dtype_name(kind));
  }
  const Tensor scales = call.checked("scale", scale, kind, {n, group_size > 0 ? ceil_div(k, group_size) : 1});
  const Tensor tiles = call.tiles("weight", weight, n, k, 4, "; pack the weight with bitmill.ops.tile_pack");
  const auto values = call.checked("codebook", codebook, ScalarType::Float, {16});
  const auto global = call.checked("global_scale", global_scale, ScalarType::Float, {});
  const auto bias_row = call.checked("bias", bias, ScalarType::Float, {n});
  const Tensor out = call.new_tensor(with_last(rows.leading, n), x.scalar_type());
  Fp4MatmulParams p;
  p.x = rows.x.const_data_ptr();
  p.dtype = float_dtype(op, rows.x);
  p.m = rows.m;
  p.weight.tiles = data<int32_t>(tiles);
  p.weight.n = n;
  p.weight.k = k;
  p.weight.table = data_or_null<float>(values);
  p.weight.scale = kind == ScalarType::Float ? data<float>(scales) : nullptr;
  p.weight.scale_bytes = kind == ScalarType::Byte ? data<uint8_t>(scales) : nullptr;
  p.weight.global_scale = data_or_null<float>(global);
  p.weight.group_size = group_size;
  p.bias = data_or_null<float>(bias_row);
  p.out = out.mutable_data_ptr();
  call.require(cuda::launch_fp4_matmul(p, values ? nullptr : &table, call.stream()));
  return out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CUDA, m) { m.impl("fp4_linear", BITMILL_BOX(bitmill::fp4_linear_cuda)); }
