// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"
#include "launchers.h"

namespace bitmill::cuda {
namespace {

thread_local cudaError_t last = cudaSuccess;

}  // namespace

Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return Status::ok;
  last = error;
  cudaGetLastError();  // a launch that was refused must not fail the next call of anybody else
  return Status::device_error;
}

Status clear_number(int32_t* number, Stream stream) {
  return status_of(cudaMemsetAsync(number, 0, sizeof *number, stream));
}

Status read_number(int32_t& value, const int32_t* number, Stream stream) {
  const Status status = status_of(cudaMemcpyAsync(&value, number, sizeof value, cudaMemcpyDeviceToHost, stream));
  return status == Status::ok ? status_of(cudaStreamSynchronize(stream)) : status;
}

const char* last_error() { return cudaGetErrorString(last); }

Device current_device() {
  Device device;
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess) return device;
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&device.compute_capability, cudaDevAttrComputeCapabilityMajor, index);
  return device;
}

}  // namespace bitmill::cuda
