// SPDX-License-Identifier: Apache-2.0
// The arguments of the salient_scatter family, for every device.
#pragma once

#include "checks.h"
#include "salient_scatter.h"

namespace bitmill {

// The arrays of a weight, checked and made contiguous; `view` points into them.
struct SalientArrays {
  Tensor weight, index, value, alpha;
  std::optional<Tensor> start, mu, value_scale, value_zero;
  SalientWeight view;

  // The product of rows with it, into nothing yet; all arguments outlive it.
  SalientMatmulParams product(const char* op, const Rows& rows, const std::optional<Tensor>& bias) const {
    SalientMatmulParams p;
    p.weight = view;
    p.x = rows.x.const_data_ptr();
    p.dtype = float_dtype(op, rows.x);
    p.m = rows.m;
    p.bias = data_or_null<float>(bias);
    return p;
  }
};

inline SalientEncoding encoding_of(const char* op, const Tensor& index) {
  const ScalarType kind = index.scalar_type();
  if (kind == ScalarType::Int && index.dim() == 3) return SalientEncoding::bitmap;
  if (kind == ScalarType::Byte && index.dim() == 2) return SalientEncoding::list;
  if (kind == ScalarType::Int && index.dim() == 1) return SalientEncoding::columns;
  fail(op, ": index must be int32 tiles (a bitmap), uint8 [steps, 16] (a list) or int32 [columns], got ",
       dtype_name(kind), " of shape ", to_string(sizes_of(index)));
}

template <class Call>
SalientArrays salient_arrays(const Call& call, const char* op, const Tensor& weight, const Tensor& index,
                             const Tensor& value, const std::optional<Tensor>& start, const Tensor& alpha,
                             const std::optional<Tensor>& mu, const std::optional<Tensor>& value_scale,
                             const std::optional<Tensor>& value_zero, int64_t k, int64_t group_size,
                             int64_t code_bits) {
  const int64_t n = alpha.dim() > 0 ? alpha.size(0) : 0;
  const Sizes scales = {n, group_count(op, k, group_size)};
  const Sizes tiles = tile_sizes(n, k);
  const SalientEncoding encoding = encoding_of(op, index);
  const bool columns = encoding == SalientEncoding::columns, list = encoding == SalientEncoding::list;
  if (list && k >= 65536) fail(op, ": a list must have fewer than 65536 columns, got ", k, "; use a bitmap");
  if (value_scale.has_value() != value_zero.has_value()) {
    fail(op, ": value_scale and value_zero must be given together");
  }
  if (code_bits != 8 && code_bits != 4) fail(op, ": code_bits must be 8 or 4, got ", code_bits);
  const bool codes = value_scale.has_value(), pairs = codes && code_bits == 4;
  const int64_t length = list || columns ? index.size(0) : value.dim() > 0 ? value.size(0) : 0;
  const Sizes values = columns ? tile_sizes(n, length, codes ? static_cast<int>(code_bits) : 16)
                       : list  ? Sizes{length, pairs ? kTileRows / 2 : kTileRows}
                               : Sizes{length};
  const ScalarType kind = columns ? ScalarType::Int : codes ? ScalarType::Byte : ScalarType::Half;
  const char* remedy = "; pack the weight with bitmill.ops.tile_pack";
  if (start.has_value() == columns) {
    fail(op, ": start must be given for a bitmap or a list and only then, got index of shape ",
         to_string(sizes_of(index)));
  }
  SalientArrays a{call.checked("weight", weight, ScalarType::Int, tiles, remedy),
                  call.checked("index", index, index.scalar_type(),
                               columns ? Sizes{length}
                               : list  ? Sizes{length, kTileRows}
                                       : tiles,
                               remedy),
                  call.checked("value", value, kind, values),
                  call.checked("alpha", alpha, ScalarType::Float, scales),
                  call.checked("start", start, ScalarType::Int, {(list ? tile_count(n) : n) + 1}),
                  call.checked("mu", mu, ScalarType::Float, scales),
                  call.checked("value_scale", value_scale, ScalarType::Float, {n}),
                  call.checked("value_zero", value_zero, ScalarType::Float, {n}),
                  {}};
  a.view.sign = data<int32_t>(a.weight);
  a.view.encoding = encoding;
  if (list) {
    a.view.gap = data<uint8_t>(a.index);
  } else {
    (columns ? a.view.column : a.view.mask) = data<int32_t>(a.index);
  }
  a.view.value = a.value.const_data_ptr();
  a.view.start = data_or_null<int32_t>(a.start);
  a.view.value_scale = data_or_null<float>(a.value_scale);
  a.view.value_zero = data_or_null<float>(a.value_zero);
  a.view.alpha = data<float>(a.alpha);
  a.view.mu = data_or_null<float>(a.mu);
  a.view.n = n;
  a.view.k = k;
  a.view.code_bits = static_cast<int>(code_bits);
  a.view.entries = pairs && !list && !columns ? 2 * length : length;
  a.view.group_size = group_size;
  return a;
}

}  // namespace bitmill
