// SPDX-License-Identifier: Apache-2.0
// How a kernel starts: on the caller's stream, with one struct of shared memory, nothing waited for.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "launchers.h"
#include "layout.h"
#include "status.h"

namespace bitmill::cuda {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kAllLanes = ~0u;

Status status_of(cudaError_t error);

// A number on the device: made 0, and read, which waits for all that the stream has to do before.
Status clear_number(int32_t* number, Stream stream);
Status read_number(int32_t& value, const int32_t* number, Stream stream);

// Kernels read weight tiles 16 bytes at a time.
inline bool aligned16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <class... Parameters, class... Arguments>
Status launch(Stream stream, void (*kernel)(Parameters...), int64_t blocks, unsigned threads, size_t shared_bytes,
              Arguments&&... arguments) {
  if (blocks > INT32_MAX) return Status::bad_size;
  if (shared_bytes > 48 * 1024) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return status_of(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace bitmill::cuda
