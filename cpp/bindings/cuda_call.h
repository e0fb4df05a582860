// SPDX-License-Identifier: Apache-2.0
// One call of a CUDA op: the device of its first argument is made the current one for the length of the call, kernels
// start on torch's current stream, and nothing waits for the GPU, so that a call can be captured in a CUDA graph.
// Memory comes from torch's allocator. Since the host never reads a tensor, the padding of packed operands is not
// checked here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>

#include "checks.h"
#include "launchers.h"

namespace bitmill {

class CudaCall : public DeviceCall<CudaCall> {
 public:
  // `first`, the argument `name`, says the device of all others.
  CudaCall(const char* op, const char* name, const Tensor& first)
      : DeviceCall(op, name), index_(index_of(op, name, first)), guard_(index_) {}

  cuda::Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cuda::Stream>(stream);
  }

  void check_device(const char* name, const Tensor& t) const {
    if (t.is_cuda() && t.get_device_index() == index_) return;
    fail(op_, ": ", name, " must be on cuda:", index_, " like ", name_, ", got ", device_name(t),
         "; move the layer or its input");
  }

  // Packed tiles; a view may begin where the kernels cannot read 16 bytes at once, and is copied then.
  Tensor tiles(const char* name, const Tensor& t, int64_t n, int64_t k, int bits, const char* remedy = "") const {
    const Tensor words = checked(name, t, ScalarType::Int, tile_sizes(n, k, bits), remedy);
    const bool aligned = reinterpret_cast<uintptr_t>(words.const_data_ptr()) % 16 == 0;
    return aligned ? words : torch::stable::clone(words);
  }
  std::optional<Tensor> tiles(const char* name, const std::optional<Tensor>& t, int64_t n, int64_t k, int bits) const {
    if (!t) return std::nullopt;
    return tiles(name, *t, n, k, bits);
  }

  Tensor new_tensor(const Sizes& sizes, ScalarType dtype) const {
    return new_tensor(sizes, contiguous_strides(sizes), dtype);
  }
  Tensor new_tensor(const Sizes& sizes, const Sizes& strides, ScalarType dtype) const {
    return new_tensor_on(aoti_torch_device_type_cuda(), index_, sizes, strides, dtype);
  }

  // A copy that the host can read, for which it waits.
  Tensor on_host(const Tensor& t) const {
    Tensor copy = bitmill::new_tensor(sizes_of(t), t.scalar_type());
    return torch::stable::copy_(copy, t);
  }

  // int8 activations are multiplied on the CPU only.
  void require_float_activations(const std::string& activations) const {
    if (activations == "float") return;
    if (activations != "int8") fail(op_, ": activations must be \"float\" or \"int8\", got \"", activations, "\"");
    fail(op_, ": activations must be \"float\" on a GPU, got \"int8\"; move the layer and its input to the CPU");
  }

  void require(Status status) const {
    if (status == Status::device_error) {
      throw std::runtime_error(std::string(op_) + ": the GPU refused a launch: " + cuda::last_error());
    }
    bitmill::require(op_, status);
  }

 private:
  static int32_t index_of(const char* op, const char* name, const Tensor& first) {
    if (!first.is_cuda()) fail(op, ": ", name, " must be on a CUDA device like the others, got ", device_name(first));
    return first.get_device_index();
  }
  static std::string device_name(const Tensor& t) {
    return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : t.is_cpu() ? "the CPU" : "another device";
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace bitmill
