// SPDX-License-Identifier: Apache-2.0
// CPU op of the binary convolution: check, allocate, call. Schema: python/bitmill/ops/binary_conv.py.
#include "binary_conv.h"
#include "bit_checks.h"
#include "boxing.h"
#include "checks.h"

namespace bitmill {
namespace {

constexpr const char* kOp = "binary_conv2d";
constexpr double kMostResults = 0x1p48;  // no memory holds more

// [batch, channels, height, width] with the channels next to each other, and not contiguous as it is.
bool has_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  int64_t step = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != step) return false;
    step *= x.size(dim);
  }
  return true;
}

void check_count(const char* name, const Sizes& values, size_t count, int64_t smallest) {
  const auto fits = [&](int64_t v) { return v >= smallest && v <= kMaxColumns; };
  if (values.size() == count && std::all_of(values.begin(), values.end(), fits)) return;
  fail(kOp, ": ", name, " must be ", count, " numbers between ", smallest, " and ", kMaxColumns, ", got ",
       to_string(values));
}

ConvAxis axis(const char* name, const Tensor& x, size_t dim, const Sizes& kernel, const Sizes& stride,
              const Sizes& padding, const Sizes& dilation) {
  const ConvAxis a{x.size(static_cast<int64_t>(dim) + 2),
                   kernel[dim],
                   stride[dim],
                   padding[2 * dim],
                   padding[2 * dim + 1],
                   dilation[dim]};
  if (a.outputs() < 1) {
    fail(kOp, ": x must be at least as ", name, " as the kernel with its dilation (", a.reach(),
         "), padding included, got ", a.size, " + ", a.before + a.after);
  }
  return a;
}

Tensor binary_conv2d_cpu(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias,
                         std::optional<Tensor> weight_nonzero, std::optional<Tensor> shift, std::optional<Tensor> alpha,
                         std::optional<Tensor> row_scale, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                         std::string levels, std::string /* the surrogate of the backward */) {
  BinaryConvParams p;
  p.levels = levels_of(kOp, levels);
  if (!x.is_cpu()) fail(kOp, ": x must be on the CPU like the packed weight, got another device");
  if (x.dim() != 4 || x.size(1) < 1 || x.size(2) < 1 || x.size(3) < 1) {
    fail(kOp, ": x must have shape [batch, channels, height, width], got ", to_string(sizes_of(x)));
  }
  p.dtype = float_dtype(kOp, x);
  check_count("kernel_size", kernel_size, 2, 1);
  check_count("stride", stride, 2, 1);
  check_count("padding", padding, 4, 0);
  check_count("dilation", dilation, 2, 1);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.n = scale.dim() > 0 ? scale.size(0) : 0;
  if (p.n < 1) fail(kOp, ": scale must have shape [n], n at least 1, got ", to_string(sizes_of(scale)));
  p.groups = groups;
  if (groups < 1 || p.channels % groups != 0 || p.n % groups != 0) {
    fail(kOp, ": groups must divide the channels of x and of the output, got groups = ", groups, " for ", p.channels,
         " and ", p.n);
  }
  p.vertical = axis("high", x, 0, kernel_size, stride, padding, dilation);
  p.horizontal = axis("wide", x, 1, kernel_size, stride, padding, dilation);
  const double values = static_cast<double>(kernel_size[0] * kernel_size[1]) * static_cast<double>(p.group_channels());
  if (values > kMaxColumns) fail(kOp, ": a patch must have at most ", kMaxColumns, " values, got ", values);
  const int64_t k = p.k(), height = p.vertical.outputs(), width = p.horizontal.outputs();
  const double results = static_cast<double>(height * width) * static_cast<double>(p.batch) * static_cast<double>(p.n);
  if (results > kMostResults) {
    fail(kOp, ": there must be at most 2**48 results, got ", p.batch, " x ", p.n, " x ", height, " x ", width);
  }
  const Tensor scales = checked(kOp, "scale", scale, ScalarType::Float, {p.n});
  const Tensor tiles = checked(kOp, "weight", weight, ScalarType::Int, tile_sizes(p.n, k), kPackRemedy);
  const auto tiles_nonzero = checked(kOp, "weight_nonzero", weight_nonzero, ScalarType::Int, tile_sizes(p.n, k));
  check_tile_padding(kOp, "weight", tiles, p.n, k);
  const auto bias_row = checked(kOp, "bias", bias, ScalarType::Float, {p.n});
  const auto shift_row = checked(kOp, "shift", shift, ScalarType::Float, {p.channels});
  const auto step = checked(kOp, "alpha", alpha, ScalarType::Float, {});
  const auto rows = checked(kOp, "row_scale", row_scale, ScalarType::Float, {p.batch, height, width});

  const bool channels_last = has_channels_last(x);
  p.channels_last = channels_last && groups == 1;
  const Tensor image = p.channels_last ? x : as_contiguous(x);
  const Sizes sizes = {p.batch, p.n, height, width};
  const Tensor out = p.channels_last ? new_tensor(sizes, {height * width * p.n, 1, width * p.n, p.n}, x.scalar_type())
                                     : new_tensor(sizes, x.scalar_type());
  p.x = image.const_data_ptr();
  p.shift = data_or_null<float>(shift_row);
  p.threshold = (step ? *data<float>(*step) : 1.0f) / 2;
  p.weight = data<int32_t>(tiles);
  p.weight_nonzero = data_or_null<int32_t>(tiles_nonzero);
  p.scale = data<float>(scales);
  p.row_scale = data_or_null<float>(rows);
  p.bias = data_or_null<float>(bias_row);
  p.out = out.mutable_data_ptr();
  p.parallel_for = torch_parallel_for;
  require(kOp, binary_conv(p));
  return out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) { m.impl("binary_conv2d", BITMILL_BOX(bitmill::binary_conv2d_cpu)); }
