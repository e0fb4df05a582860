// SPDX-License-Identifier: Apache-2.0
// CPU ops of the zoned family: check, allocate, call. Schemas: python/bitmill/ops/zoned.py.
#include "boxing.h"
#include "checks.h"
#include "zoned_arguments.h"

namespace bitmill {
namespace {

Tensor zoned_linear_cpu(Tensor x, Tensor sign, Tensor zone, std::optional<Tensor> salient_zone, Tensor salient,
                        Tensor scale, std::optional<Tensor> column_scale, std::optional<Tensor> bias, int64_t n,
                        int64_t block) {
  const char* op = "zoned_linear";
  const Rows rows = rows_of(op, x);
  const ZonedArrays arrays =
      zoned_arrays(CpuCall(op, "x", x), op, sign, zone, salient_zone, salient, scale, column_scale, n, rows.k, block);
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  ZonedMatmulParams p = arrays.product(op, rows, bias_row);
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  p.out = out.mutable_data_ptr();
  p.parallel_for = torch_parallel_for;
  require(op, zoned_matmul(p));
  return out;
}

Tensor zoned_weight_cpu(Tensor sign, Tensor zone, std::optional<Tensor> salient_zone, Tensor salient, Tensor scale,
                        std::optional<Tensor> column_scale, int64_t n, int64_t k, int64_t block) {
  const char* op = "zoned_weight";
  const ZonedArrays arrays =
      zoned_arrays(CpuCall(op, "sign", sign), op, sign, zone, salient_zone, salient, scale, column_scale, n, k, block);
  const Tensor dense = new_tensor({n, k}, ScalarType::Float);
  require(op, zoned_dequantize(arrays.view, mutable_data<float>(dense), torch_parallel_for));
  return dense;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("zoned_linear", BITMILL_BOX(bitmill::zoned_linear_cpu));
  m.impl("zoned_weight", BITMILL_BOX(bitmill::zoned_weight_cpu));
}
