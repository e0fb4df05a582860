// SPDX-License-Identifier: Apache-2.0
// Rows of floats as 4-bit floats and integers of them, by core's functions of a value; a warp has a row.
#include "device.cuh"
#include "fp4_activations.h"
#include "launch.cuh"
#include "units.cuh"

namespace bitmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarps = kThreads / kWarp;

// A format's steps, and the integers of its codes. They stand in shared memory, where no two of them meet in a bank.
struct Caster {
  Fp4Steps steps;
  int32_t integer[16];
};

__device__ int32_t integer_of(const Caster& caster, const int32_t (&integer)[16], float value) {
  return integer[fp4_code(std::bit_cast<uint32_t>(value), caster.steps)];
}

__device__ void store_integers(int8_t* to, int64_t left, bool aligned, const int32_t (&q)[8]) {
  if (aligned && left >= 8) {
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i / 4] |= static_cast<uint32_t>(q[i] & 255) << i % 4 * 8;
    *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < left) to[i] = static_cast<int8_t>(q[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    fp4_activations_kernel(Fp4ActivationsParams p, const float* input_scale, const __grid_constant__ Caster caster,
                           bool aligned, bool aligned_out) {
  auto& integer = shared_memory<int32_t[16]>();
  if (threadIdx.x < 16) integer[threadIdx.x] = caster.integer[threadIdx.x];
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= p.m) return;  // a whole warp
  const T* x = static_cast<const T*>(p.x) + row * p.k;
  int8_t* q = p.q + row * p.k;
  const int64_t passes = ceil_div(p.k, kUnit * kWarp);  // lanes of a pass have neighbouring units
  if (p.kind == Fp4Activations::fpq) {
    const float scale = input_scale ? *input_scale : p.scale;
    const int most = (1 << p.format.exponent_bits) - 1;
    bool nan = false;
    for (int64_t column = kUnit * lane; column < p.k; column += kUnit * kWarp) {
      float value[8];
      int32_t whole[8];
      load8(x + column, p.k - column, aligned, value);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int shift = p.shift && column + i < p.k ? p.shift[column + i] : 0;
        shift = shift < most ? shift : most;
        const float quotient = value[i] / (scale / static_cast<float>(1 << shift));
        const bool number = quotient == quotient;
        nan |= !number && column + i < p.k;
        whole[i] = number ? integer_of(caster, integer, quotient) * (1 << (most - shift)) : 0;
      }
      store_integers(q + column, p.k - column, aligned_out, whole);
    }
    const bool any = __ballot_sync(kAllLanes, nan) != 0;
    if (lane == 0) p.row_scale[row] = any ? std::bit_cast<float>(0x7FC00000u) : scale * (0.5f / (1 << most));
    return;
  }
  const bool mxfp4 = p.kind == Fp4Activations::mxfp4;
  const int units = static_cast<int>((mxfp4 ? kMxBlock : kNvBlock) / kUnit);
  const int64_t groups = ceil_div(p.k, kUnit * units);
  detail::BlockScale whole{1.0f, 1.0f};
  if (!mxfp4) {
    uint32_t amax = 0;
    for (int64_t column = kUnit * lane; column < p.k; column += kUnit * kWarp) {
      float value[8];
      load8(x + column, p.k - column, aligned, value);
      const uint32_t found = largest_magnitude(value);
      amax = found > amax ? found : amax;
    }
    whole = detail::nvfp4_row(largest_of_lanes(amax, kWarp));
  }
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t unit = pass * kWarp + lane, column = kUnit * unit, left = p.k - column;
    float value[8];
    load8(x + (left > 0 ? column : 0), left, aligned, value);
#pragma unroll
    for (float& v : value) v *= whole.inverse;
    const uint32_t amax = largest_of_lanes(largest_magnitude(value), units);
    const detail::BlockScale found = mxfp4 ? detail::mxfp4_block(amax, p.rule) : detail::nvfp4_block(amax);
    const bool valid = found.scale == found.scale;
    int32_t integers[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) integers[i] = valid ? integer_of(caster, integer, value[i] * found.inverse) : 0;
    if (left <= 0) continue;
    store_integers(q + column, left, aligned_out, integers);
    if (unit % units == 0) p.row_scale[row * groups + unit / units] = found.scale * whole.scale * 0.5f;
  }
}

}  // namespace

Status launch_fp4_activations(const Fp4ActivationsParams& p, Stream stream, const float* input_scale) {
  if (p.m < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.kind == Fp4Activations::fpq && p.format.exponent_bits > 2) return Status::bad_argument;
  if (p.m == 0) return Status::ok;
  const Fp4Format format = p.kind == Fp4Activations::fpq ? p.format : kE2M1;
  Caster caster{fp4_steps(format), {}};
  Fp4Integers integers;
  fp4_integers(fp4_table(format).value, integers);
  for (int i = 0; i < 16; ++i) caster.integer[i] = integers.value[i];
  return with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    const bool aligned = aligned16(p.x) && p.k * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    const bool aligned_out = p.k % 8 == 0 && reinterpret_cast<uintptr_t>(p.q) % 8 == 0;
    return launch(stream, fp4_activations_kernel<T>, ceil_div(p.m, kWarps), kThreads, sizeof caster.integer, p,
                  input_scale, caster, aligned, aligned_out);
  });
}

}  // namespace bitmill::cuda
