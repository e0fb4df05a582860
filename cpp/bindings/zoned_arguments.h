// SPDX-License-Identifier: Apache-2.0
// The arguments of the zoned family, for every device.
#pragma once

#include "checks.h"
#include "zoned.h"

namespace bitmill {

// The arrays of a weight, checked and made contiguous; `view` points into them.
struct ZonedArrays {
  Tensor sign, zone, salient, scale;
  std::optional<Tensor> salient_zone, column_scale;
  ZonedWeight view;

  // The product of rows with it, into nothing yet; all arguments outlive it.
  ZonedMatmulParams product(const char* op, const Rows& rows, const std::optional<Tensor>& bias) const {
    ZonedMatmulParams p;
    p.weight = view;
    p.x = rows.x.const_data_ptr();
    p.dtype = float_dtype(op, rows.x);
    p.m = rows.m;
    p.bias = data_or_null<float>(bias);
    return p;
  }
};

template <class Call>
ZonedArrays zoned_arrays(const Call& call, const char* op, const Tensor& sign, const Tensor& zone,
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
  ZonedArrays a{call.checked("sign", sign, ScalarType::Int, tile_sizes(n, k), remedy),
                call.checked("zone", zone, ScalarType::Int, tile_sizes(n, k), remedy),
                call.checked("salient", salient, ScalarType::Int, {word_count(k)}, remedy),
                call.checked("scale", scale, kind, {tile_count(n), ceil_div(k, block), expected, kTileRows}, remedy),
                call.checked("salient_zone", salient_zone, ScalarType::Int, tile_sizes(n, 32 * words), remedy),
                call.checked("column_scale", column_scale, kind, {k}),
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

}  // namespace bitmill
