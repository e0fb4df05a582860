// SPDX-License-Identifier: Apache-2.0
// What ops ask of their arguments; the words are those of the CPU's, cuda_call.h has the others. A failed check throws
// std::invalid_argument, which reaches Python as ValueError with the text as it is: argument, expected, got, and what
// to do where there is something to do.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "floats.h"
#include "layout.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string to_string(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

inline Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline bool same_sizes(const Tensor& t, const Sizes& sizes) {
  const auto got = t.sizes();
  return std::equal(got.begin(), got.end(), sizes.begin(), sizes.end());
}

// t has this dtype and these sizes, on whatever device.
inline void check_form(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Sizes& sizes,
                       const char* remedy = "") {
  if (t.scalar_type() != dtype) {
    fail(op, ": ", name, " must be ", dtype_name(dtype), ", got ", dtype_name(t.scalar_type()));
  }
  if (!same_sizes(t, sizes)) {
    fail(op, ": ", name, " must have shape ", to_string(sizes), ", got ", to_string(sizes_of(t)), remedy);
  }
}

// t is a CPU tensor of this dtype and these sizes.
inline void check(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Sizes& sizes,
                  const char* remedy = "") {
  if (!t.is_cpu()) fail(op, ": ", name, " must be on the CPU like x, got another device");
  check_form(op, name, t, dtype, sizes, remedy);
}

// A CPU tensor of this dtype and these sizes, made contiguous.
inline Tensor checked(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Sizes& sizes,
                      const char* remedy = "") {
  check(op, name, t, dtype, sizes, remedy);
  return as_contiguous(t);
}

inline std::optional<Tensor> checked(const char* op, const char* name, const std::optional<Tensor>& t, ScalarType dtype,
                                     const Sizes& sizes, const char* remedy = "") {
  if (!t) return std::nullopt;
  return checked(op, name, *t, dtype, sizes, remedy);
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Dtype float_dtype(const char* op, const Tensor& x,
                         const char* expected = "x must be float32, bfloat16 or float16") {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      fail(op, ": ", expected, ", got ", dtype_name(x.scalar_type()));
  }
}

// x as rows [m, k]: leading dimensions of any number, contiguous.
struct Rows {
  Tensor x;
  Sizes leading;
  int64_t m = 1, k = 0;
};

// Of a tensor on whatever device.
inline Rows any_rows_of(const char* op, const Tensor& x) {
  if (x.dim() < 1) fail(op, ": x must have at least one dimension, got a scalar");
  Rows rows{as_contiguous(x), sizes_of(x)};
  rows.k = rows.leading.back();
  rows.leading.pop_back();
  for (const int64_t size : rows.leading) rows.m *= size;
  if (rows.k > kMaxColumns) fail(op, ": x must have at most ", kMaxColumns, " columns, got ", rows.k);
  return rows;
}

inline Rows rows_of(const char* op, const Tensor& x) {
  if (!x.is_cpu()) fail(op, ": x must be on the CPU like the packed weight, got another device");
  return any_rows_of(op, x);
}

inline Sizes with_last(const Sizes& leading, int64_t last) {
  Sizes sizes = leading;
  sizes.push_back(last);
  return sizes;
}

inline Sizes tile_sizes(int64_t n, int64_t k, int bits = 1) { return {tile_count(n), word_count(k, bits), kTileRows}; }

// Groups of group_size columns, or the one of all columns for 0.
inline int64_t group_count(const char* op, int64_t k, int64_t group_size, int64_t multiple = 32) {
  if (group_size < 0 || group_size > kMaxColumns || group_size % multiple != 0) {
    fail(op, ": group_size must be 0 or a positive multiple of ", multiple, " up to ", kMaxColumns, ", got ",
         group_size);
  }
  return group_size > 0 ? ceil_div(k, group_size) : 1;
}

// An uninitialised tensor on a device.
inline Tensor new_tensor_on(int32_t type, int32_t index, const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, type, index,
                               &handle) != TORCH_SUCCESS) {
    throw std::runtime_error("bitmill: there is no memory for a tensor of shape " + to_string(sizes));
  }
  return Tensor(handle);
}

// Strides of dimensions that follow each other in memory as in `order`, the last one closest.
inline Sizes strides_of(const Sizes& sizes, const std::vector<size_t>& order) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = step;
    step *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return strides;
}

inline Sizes contiguous_strides(const Sizes& sizes) {
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  return strides_of(sizes, order);
}

// An uninitialised CPU tensor.
inline Tensor new_tensor(const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  return new_tensor_on(aoti_torch_device_type_cpu(), 0, sizes, strides, dtype);
}

// The same; its dimensions follow each other in memory as in `order`, the last one closest.
inline Tensor new_tensor(const Sizes& sizes, ScalarType dtype, const std::vector<size_t>& order) {
  return new_tensor(sizes, strides_of(sizes, order), dtype);
}

// The same, contiguous.
inline Tensor new_tensor(const Sizes& sizes, ScalarType dtype) {
  return new_tensor(sizes, contiguous_strides(sizes), dtype);
}

// Uninitialised memory for the length of a call; cheaper than a tensor.
template <class T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

inline void torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { body(context, from, to); });
}

inline void require(const char* op, Status status) {
  if (status != Status::ok) fail(op, ": ", describe(status));
}

// What a call of an op is on every device; Call::check_device says where tensors have to be.
template <class Call>
class DeviceCall {
 public:
  // t has this dtype and these sizes, on the call's device.
  void check(const char* name, const Tensor& t, ScalarType dtype, const Sizes& sizes, const char* remedy = "") const {
    static_cast<const Call&>(*this).check_device(name, t);
    check_form(op_, name, t, dtype, sizes, remedy);
  }

  // The same, made contiguous.
  Tensor checked(const char* name, const Tensor& t, ScalarType dtype, const Sizes& sizes,
                 const char* remedy = "") const {
    check(name, t, dtype, sizes, remedy);
    return as_contiguous(t);
  }
  std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& t, ScalarType dtype, const Sizes& sizes,
                                const char* remedy = "") const {
    if (!t) return std::nullopt;
    return checked(name, *t, dtype, sizes, remedy);
  }

 protected:
  // The argument `name` says the device of all others.
  DeviceCall(const char* op, const char* name) : op_(op), name_(name) {}

  const char* op_;
  const char* name_;
};

// One call of an op on the CPU, for what is written once for every device; CudaCall in cuda_call.h is its counterpart.
class CpuCall : public DeviceCall<CpuCall> {
 public:
  // `first`, the argument `name`, says the device of all others.
  CpuCall(const char* op, const char* name, const Tensor& first) : DeviceCall(op, name) { check_device(name, first); }

  void check_device(const char* name, const Tensor& t) const {
    if (!t.is_cpu()) fail(op_, ": ", name, " must be on the CPU like ", name_, ", got another device");
  }

  Tensor new_tensor(const Sizes& sizes, ScalarType dtype) const { return bitmill::new_tensor(sizes, dtype); }
  Tensor new_tensor(const Sizes& sizes, const Sizes& strides, ScalarType dtype) const {
    return bitmill::new_tensor(sizes, strides, dtype);
  }

  // A tensor that the host can read, contiguous.
  Tensor on_host(const Tensor& t) const { return as_contiguous(t); }

  void require(Status status) const { bitmill::require(op_, status); }
};

}  // namespace bitmill
