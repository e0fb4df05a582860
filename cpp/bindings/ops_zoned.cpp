// SPDX-License-Identifier: Apache-2.0
// CPU ops of the zoned family: check, allocate, call. Schemas: python/bitmill/ops/zoned.py.
#include "boxing.h"
#include "checks.h"
#include "zoned.h"

namespace bitmill {
namespace {

// The arrays of a weight, checked and made contiguous; `view` points into them.
struct ZonedArrays {
  Tensor sign, zone, salient, scale;
  std::optional<Tensor> salient_zone, column_scale;
  ZonedWeight view;
};

ZonedArrays zoned_arrays(const char* op, const Tensor& sign, const Tensor& zone,
                         const std::optional<Tensor>& salient_zone, const Tensor& salient, const Tensor& scale,
                         const std::optional<Tensor>& column_scale, int64_t n, int64_t k, int64_t block) {
  if (n < 0 || k < 0 || k > kMaxColumns) {
    fail(op, ": n must be at least 0 and k between 0 and ", kMaxColumns, ", got n = ", n, ", k = ", k);
  }
  if (block <= 0 || block > kMaxColumns || block % 32 != 0) {
    fail(op, ": block must be a positive multiple of 32 up to ", kMaxColumns, ", got ", block);
  }
  const char* remedy = "; pack the weight with bitmill.ops.zoned.pack";
  const ScalarType kind = scale.scalar_type();
  if (kind != ScalarType::Half && kind != ScalarType::Float) {
    fail(op, ": scale must be float16 or float32, got ", dtype_name(kind));
  }
  ZonedWeight view;
  const int64_t words = salient_zone && salient_zone->dim() == 3 ? salient_zone->size(1) : 0;
  const int64_t zones = salient_zone ? 4 : 3, scales = scale.dim() == 4 ? scale.size(2) : 0;
  view.centred = scales != 2 * zones - 2;
  const int64_t expected = view.centred ? 3 * zones - 2 : 2 * zones - 2;
  ZonedArrays a{checked(op, "sign", sign, ScalarType::Int, tile_sizes(n, k), remedy),
                checked(op, "zone", zone, ScalarType::Int, tile_sizes(n, k), remedy),
                checked(op, "salient", salient, ScalarType::Int, {word_count(k)}, remedy),
                checked(op, "scale", scale, kind, {tile_count(n), ceil_div(k, block), expected, kTileRows}, remedy),
                checked(op, "salient_zone", salient_zone, ScalarType::Int, tile_sizes(n, 32 * words), remedy),
                checked(op, "column_scale", column_scale, kind, {k}),
                view};
  ZonedWeight& w = a.view;
  w.sign = data<int32_t>(a.sign);
  w.zone = data<int32_t>(a.zone);
  w.split = salient_zone.has_value();
  w.salient_zone = data_or_null<int32_t>(a.salient_zone);
  w.salient_zone_words = words;
  w.salient = data<int32_t>(a.salient);
  w.scale = a.scale.const_data_ptr();
  w.column_scale = a.column_scale ? a.column_scale->const_data_ptr() : nullptr;
  w.scale_dtype = kind == ScalarType::Half ? Dtype::f16 : Dtype::f32;
  w.n = n, w.k = k, w.block = block;
  return a;
}

Tensor zoned_linear_cpu(Tensor x, Tensor sign, Tensor zone, std::optional<Tensor> salient_zone, Tensor salient,
                        Tensor scale, std::optional<Tensor> column_scale, std::optional<Tensor> bias, int64_t n,
                        int64_t block) {
  const char* op = "zoned_linear";
  const Rows rows = rows_of(op, x);
  const ZonedArrays arrays = zoned_arrays(op, sign, zone, salient_zone, salient, scale, column_scale, n, rows.k, block);
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  ZonedMatmulParams p;
  p.weight = arrays.view;
  p.x = rows.x.const_data_ptr();
  p.dtype = float_dtype(op, rows.x);
  p.m = rows.m;
  p.bias = data_or_null<float>(bias_row);
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  p.out = out.mutable_data_ptr();
  p.parallel_for = torch_parallel_for;
  require(op, zoned_matmul(p));
  return out;
}

Tensor zoned_weight_cpu(Tensor sign, Tensor zone, std::optional<Tensor> salient_zone, Tensor salient, Tensor scale,
                        std::optional<Tensor> column_scale, int64_t n, int64_t k, int64_t block) {
  const char* op = "zoned_weight";
  const ZonedArrays arrays = zoned_arrays(op, sign, zone, salient_zone, salient, scale, column_scale, n, k, block);
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
