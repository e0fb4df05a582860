// SPDX-License-Identifier: Apache-2.0
// The part of CUDA that the kernels in cpp/cuda use, on one thread of the host: a kernel's source is compiled by the
// host's compiler with this header in the place of CUDA's, and a launch runs its grid at once. Every CUDA thread is a
// fiber; a block's fibers run in turn and change at barriers only. What a GPU leaves to chance is made as hostile as
// possible: shared memory begins with garbage, asynchronous copies arrive at the last moment, and threads and blocks
// can run last to first. Sanitizers see every access.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulation {

// All fibers of a block or of a warp pass it, or none does.
struct Barrier {
  int size = 0, arrived = 0;
  uint64_t passed = 0;
};

struct Copy {
  void* to;
  const void* from;  // or null: zeros
  size_t bytes;
};

struct Warp {
  Barrier barrier;
  // What each lane shows the others. Two sets in turn: a lane may reach the next exchange before the others have read.
  alignas(16) unsigned char shown[2][32][64];
  unsigned votes[2] = {};
};

struct Thread {
  dim3 index;
  int lane = 0;
  Warp* warp = nullptr;
  int exchange = 0;
  std::vector<std::vector<Copy>> copies{1};  // groups, the last one open
};

struct Block {
  dim3 index;
  Barrier barrier;
  unsigned char* shared = nullptr;
  Thread* thread = nullptr;  // the running one
};

inline Block* block = nullptr;      // the running one
inline bool last_to_first = false;  // the order of threads and blocks
inline int compute_capability = 9;

void run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);
void wait(Barrier& barrier);
void pause();  // lets the others run
void finish_copies(size_t groups_left);

// Shows `value` to the warp and answers what `read` makes of it: read(of) where of(lane) is the value of a lane.
template <class T, class Read>
auto exchange(const T& value, const Read& read) {
  Thread& thread = *block->thread;
  static_assert(sizeof(T) <= sizeof thread.warp->shown[0][0]);
  auto& shown = thread.warp->shown[thread.exchange ^= 1];
  new (shown[thread.lane]) T(value);
  wait(thread.warp->barrier);
  return read([&](int lane) -> const T& { return *std::launder(reinterpret_cast<const T*>(shown[lane])); });
}

}  // namespace emulation

#define threadIdx (emulation::block->thread->index)
#define blockIdx (emulation::block->index)

inline void __syncthreads() { emulation::wait(emulation::block->barrier); }
inline void __syncwarp() { emulation::wait(emulation::block->thread->warp->barrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, [&](auto of) { return of(emulation::block->thread->lane ^ mask); });
}

template <class T>
T __shfl_down_sync(unsigned, T value, int distance) {
  const int lane = emulation::block->thread->lane + distance;
  return emulation::exchange(value, [&](auto of) { return of(lane < 32 ? lane : lane - distance); });
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, [&](auto of) { return of(lane); });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  emulation::Thread& thread = *emulation::block->thread;
  unsigned& votes = thread.warp->votes[thread.exchange ^= 1];
  votes = (votes & ~(1u << thread.lane)) | unsigned{value} << thread.lane;
  emulation::wait(thread.warp->barrier);
  return votes;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

// Byte i of the result is that of number selector >> 4 i, modulo 8, of the bytes of low and then high.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7u) * 8 & 255u) << 8 * i;
  return result;
}

inline unsigned __brev(unsigned bits) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1u) << (31 - i);
  return reversed;
}

// The runtime's calls.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : emulation::compute_capability;
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration";
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidConfiguration;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const unsigned threads = config->blockDim.x * config->blockDim.y * config->blockDim.z;
  if (threads == 0 || threads > 1024 || threads % 32 != 0) return cudaErrorInvalidConfiguration;
  if (config->gridDim.x == 0 || config->gridDim.y > 65535 || config->gridDim.z > 65535)
    return cudaErrorInvalidConfiguration;
  emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
