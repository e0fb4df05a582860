// SPDX-License-Identifier: Apache-2.0
#include "torch_layer_norm.h"

#include <array>
#include <cstring>

#include "checks.h"

namespace bitmill {
namespace {

using torch::stable::detail::from;

Tensor borrowed(const float* data, const Sizes& sizes) {
  const Sizes strides = sizes.size() == 2 ? Sizes{sizes[1], 1} : Sizes{1};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<float*>(data), sizes, strides, cpu, ScalarType::Float);
}

void torch_layer_norm(const LayerNormParams& p) {
  const Sizes row = {p.n};
  std::array<StableIValue, 5> stack{from(borrowed(p.x, {p.m, p.n})), from(row),
                                    from(std::optional(borrowed(p.weight, row))),
                                    from(std::optional(borrowed(p.bias, row))), from(static_cast<double>(p.eps))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::native_layer_norm", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor results[] = {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
                            torch::stable::detail::to<Tensor>(stack[2])};
  std::memcpy(p.out, results[0].const_data_ptr(), static_cast<size_t>(p.m * p.n) * sizeof(float));
}

// Whether `layer_norm` has torch's bits. On rows that fill no vector, of blocks of 16 vectors whose number is no power
// of two, of values of every size: where one order of operations differs from another, so do these bits.
bool has_the_bits_of_torch() {
  constexpr int64_t m = 8, n = 16 * 16 * 5 + 16 * 7 + 13;
  std::vector<float> x(m * n), weight(n), bias(n), expected(m * n), got(m * n);
  uint32_t state = 1;
  const auto random = [&] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
  };
  for (auto* values : {&x, &weight, &bias}) {
    for (float& value : *values) value = 3.0f * random() + 0.5f;
  }
  LayerNormParams p;
  p.x = x.data();
  p.m = m;
  p.n = n;
  p.weight = weight.data();
  p.bias = bias.data();
  p.eps = 1e-5f;
  p.out = expected.data();
  torch_layer_norm(p);
  p.out = got.data();
  return layer_norm(p) == Status::ok && std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0;
}

}  // namespace

void run_with_layer_norm(const char* op, std::span<const RowStep> steps) {
  static const bool ours = has_the_bits_of_torch();
  size_t begin = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto* norm = std::get_if<LayerNormParams>(&steps[i]);
    if (!norm || ours) continue;
    require(op, row_steps(steps.subspan(begin, i - begin)));
    torch_layer_norm(*norm);
    begin = i + 1;
  }
  require(op, row_steps(steps.subspan(begin)));
}

}  // namespace bitmill
