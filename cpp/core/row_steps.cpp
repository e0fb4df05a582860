// SPDX-License-Identifier: Apache-2.0
#include "row_steps.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

namespace bitmill {
namespace {

constexpr int64_t kRowsAtOnce = 256;  // so many that weights are seldom read again, and few enough for a second cache

Status run(const BitpackParams& p) { return bitpack(p); }
Status run(const BinaryMatmulParams& p) { return binary_matmul(p); }
Status run(const LayerNormParams& p) { return layer_norm(p); }
Status run(const BinaryEmbeddingParams& p) { return binary_embedding(p); }
Status run(const AddRowsParams& p) { return add_rows(p); }

Status run_all(std::span<const RowStep> steps) {
  Status status = Status::ok;
  for (size_t i = 0; i < steps.size() && status == Status::ok; ++i) {
    status = std::visit([](const auto& step) { return run(step); }, steps[i]);
  }
  return status;
}

}  // namespace

Status row_steps(std::span<const RowStep> steps) {
  if (steps.empty()) return Status::ok;
  const auto [m, parallel_for] = std::visit([](const auto& p) { return std::pair{p.m, p.parallel_for}; }, steps[0]);
  double cost = 0;  // of a row
  for (const RowStep& step : steps) {
    if (std::visit([](const auto& p) { return p.m; }, step) != m) return Status::bad_size;
    cost += std::visit([](const auto& p) { return nanoseconds_per_row(p); }, step);
  }
  if (m < kManyRows) return run_all(steps);
  std::atomic<Status> status{Status::ok};
  split_rows(parallel_for, m, cost, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += kRowsAtOnce) {
      std::vector<RowStep> part(steps.begin(), steps.end());
      for (RowStep& step : part) {
        std::visit(
            [&](auto& p) {
              p = rows_of(p, begin, std::min(begin + kRowsAtOnce, last));
              p.parallel_for = serial_for;
            },
            step);
      }
      const Status got = run_all(part);
      if (got != Status::ok) status = got;
    }
  });
  return status;
}

}  // namespace bitmill
