// SPDX-License-Identifier: Apache-2.0
// CPU ops of the binary_embedding family: check, allocate, call. Schemas: python/bitmill/ops/binary_embedding.py.
#include <algorithm>

#include "add_rows.h"
#include "binary_embedding.h"
#include "blocks.h"
#include "boxing.h"
#include "torch_layer_norm.h"

namespace bitmill {
namespace {

// Ids of rows of a table.
Tensor checked_ids(const char* op, const char* name, const Tensor& ids, const Sizes& sizes, int64_t rows) {
  const Tensor places = checked(op, name, ids, ScalarType::Long, sizes);
  const int64_t *begin = data<int64_t>(places), *end = begin + places.numel();
  const auto* outside = std::find_if(begin, end, [&](int64_t id) { return id < 0 || id >= rows; });
  if (outside != end) {
    throw std::out_of_range(std::string(op) + ": " + name + " must lie in [0, " + std::to_string(rows) + "), got " +
                            std::to_string(*outside));
  }
  return places;
}

int64_t row_count(const Tensor& table) { return table.dim() > 0 ? table.size(0) : 0; }

// A table of bits and the ids of the rows that are looked up.
struct BinaryTable {
  Tensor scale, ids;
  BinaryWeight bits;
  int64_t group_size;
  Dtype dtype;

  BinaryTable(const char* op, const Tensor& places, const Tensor& weight, const std::optional<Tensor>& weight_nonzero,
              const Tensor& scales, int64_t k, int64_t group)
      : scale(checked(op, "scale", scales, scales.scalar_type(), {row_count(scales), groups_of(op, k, group)})),
        ids(checked_ids(op, "ids", places, sizes_of(places), scale.size(0))),
        bits(binary_weight(op, weight, weight_nonzero, scale.size(0), k)),
        group_size(group),
        dtype(float_dtype(op, scales, "scale must be float32, bfloat16 or float16")) {}

  // Its rows, to `out`.
  BinaryEmbeddingParams rows(void* out) const {
    BinaryEmbeddingParams p;
    p.ids = data<int64_t>(ids);
    p.m = ids.numel();
    p.weight = data<int32_t>(bits.tiles);
    p.weight_nonzero = data_or_null<int32_t>(bits.nonzero);
    p.rows = bits.n;
    p.k = bits.k;
    p.scale = scale.const_data_ptr();
    p.group_size = group_size;
    p.out = out;
    p.dtype = dtype;
    p.parallel_for = torch_parallel_for;
    return p;
  }

 private:
  static int64_t groups_of(const char* op, int64_t k, int64_t group) {
    if (k < 0 || k > kMaxColumns) fail(op, ": k must be between 0 and ", kMaxColumns, ", got ", k);
    return group_count(op, k, group);
  }
};

Tensor binary_embedding_cpu(Tensor ids, Tensor weight, std::optional<Tensor> weight_nonzero, Tensor scale, int64_t k,
                            int64_t group_size) {
  const char* op = "binary_embedding";
  const BinaryTable table(op, ids, weight, weight_nonzero, scale, k, group_size);
  const Tensor out = new_tensor(with_last(sizes_of(ids), k), scale.scalar_type());
  require(op, binary_embedding(table.rows(out.mutable_data_ptr())));
  return out;
}

// Of a table with any number of rows.
Tensor checked_table(const char* op, const char* name, const Tensor& table, int64_t k) {
  return checked(op, name, table, ScalarType::Float, {row_count(table), k});
}

Tensor binary_embedding_norm_cpu(Tensor ids, Tensor weight, std::optional<Tensor> weight_nonzero, Tensor scale,
                                 int64_t k, int64_t group_size, Tensor types, std::optional<Tensor> type_ids,
                                 Tensor positions, int64_t first, Tensor norm_weight, Tensor norm_bias, double eps) {
  const char* op = "binary_embedding_norm";
  const BinaryTable words(op, ids, weight, weight_nonzero, scale, k, group_size);
  if (words.dtype != Dtype::f32) fail(op, ": scale must be float32, got ", dtype_name(scale.scalar_type()));
  const Sizes sizes = sizes_of(ids);
  if (sizes.empty()) fail(op, ": ids must have at least one dimension, got a scalar");
  const Tensor type_rows = checked_table(op, "types", types, k);
  const int64_t type_count = type_rows.size(0), n = sizes.back();
  if (type_count == 0) fail(op, ": types must have at least one row, got none");
  std::optional<Tensor> of_types;
  if (type_ids) of_types = checked_ids(op, "type_ids", *type_ids, sizes, type_count);
  const Tensor position_rows = checked_table(op, "positions", positions, k);
  if (first < 0) fail(op, ": first must be at least 0, got ", first);
  if (first > position_rows.size(0) - n) {
    fail(op, ": positions must have rows for ", n, " ids from ", first, " on, got ", position_rows.size(0), " rows");
  }
  const Norm norm(op, "norm_", norm_weight, norm_bias, eps, k);
  const Tensor out = new_tensor(with_last(sizes, k), ScalarType::Float);
  float* x = mutable_data<float>(out);
  const int64_t m = words.ids.numel();
  AddRowsParams type;
  type.x = x;
  type.m = m;
  type.k = k;
  type.table = data<float>(type_rows);
  type.rows = of_types ? type_count : 1;
  type.ids = data_or_null<int64_t>(of_types);
  type.parallel_for = torch_parallel_for;
  AddRowsParams position = type;
  position.table = data<float>(position_rows) + first * k;
  position.rows = n;
  position.ids = nullptr;
  const RowStep steps[] = {words.rows(x), type, position, norm.of(x, x, m)};
  run_with_layer_norm(op, steps);
  return out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("binary_embedding", BITMILL_BOX(bitmill::binary_embedding_cpu));
  m.impl("binary_embedding_norm", BITMILL_BOX(bitmill::binary_embedding_norm_cpu));
}
