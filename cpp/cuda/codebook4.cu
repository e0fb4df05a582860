// SPDX-License-Identifier: Apache-2.0
// Quantisation to the 16 values of a table: some lanes of a warp share a group, find its largest magnitude, and read it
// again for the codes. A block orders the table first.
#include "codebook4.h"
#include "device.cuh"
#include "launch.cuh"
#include "units.cuh"

namespace bitmill::cuda {
namespace {

struct CodebookShared {
  OrderedCodebook ordered;
  float table[16];
};

// 2^lanes_log lanes a group.
template <class T, bool stochastic>
__global__ void __launch_bounds__(kUnitThreads)
    codebook4_quantize_kernel(Codebook4QuantizeParams p, int64_t groups, int lanes_log, bool aligned,
                              bool aligned_out) {
  auto& shared = shared_memory<CodebookShared>();
  const auto thread = static_cast<unsigned>(threadIdx.x);
  if (thread < 16) shared.table[thread] = p.codebook[thread];
  __syncthreads();
  if (thread < 16) place_in_order(shared.table, static_cast<int>(thread), shared.ordered);
  __syncthreads();
  if (thread < 15) place_middle(static_cast<int>(thread), shared.ordered);
  __syncthreads();
  const int lanes = 1 << lanes_log, lane = static_cast<int>(thread) & (lanes - 1);
  const int64_t group = int64_t{blockIdx.x} * (kUnitThreads >> lanes_log) + (thread >> lanes_log);
  const bool inside = group < p.m * groups;
  const int64_t row = inside ? group / groups : 0, width = p.group_size > 0 ? p.group_size : p.k;
  const int64_t first = inside ? group % groups * width : 0;
  const int64_t last = !inside ? 0 : first + width < p.k ? first + width : p.k, bytes = ceil_div(p.k, 2);
  const T* x = static_cast<const T*>(p.x) + row * p.row_stride;
  uint32_t largest = 0, amax = 0;
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(shared.table[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  for (int64_t column = first + kUnit * lane; column < last; column += kUnit * lanes) {
    float z[8];
    load8(x + column, last - column, aligned, z);
    const uint32_t found = largest_magnitude(z);
    amax = found > amax ? found : amax;
  }
  const ScaledGroup scaled = codebook4_scaled(largest_of_lanes(amax, lanes), largest);
  if (inside && lane == 0) p.scale[group] = scaled.scale;
  const bool valid = scaled.scale == scaled.scale;
  for (int64_t column = first + kUnit * lane; column < last; column += kUnit * lanes) {
    float z[8];
    uint32_t random[8] = {}, codes = 0;
    load8(x + column, last - column, aligned, z);
    if constexpr (stochastic) random_words(p.random, static_cast<uint64_t>(row * p.k + column), random);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = z[i] * scaled.inverse;
      const uint32_t code =
          stochastic ? stochastic_code(value, shared.ordered, random[i]) : nearest_code(value, shared.ordered);
      codes |= valid && i < last - column ? code << 4 * i : 0u;  // 0 may have another code than 0
    }
    store_codes(p.packed + row * bytes + column / 2, bytes - column / 2, aligned_out, codes);
  }
}

}  // namespace

Status launch_codebook4_quantize(const Codebook4QuantizeParams& p, Stream stream) {
  if (p.m < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.group_size < 0 || p.group_size % 8 != 0) return Status::bad_argument;
  const int64_t groups = p.groups(), width = p.width() < p.k ? p.width() : p.k;
  if (p.m * groups == 0) return Status::ok;
  int lanes_log = 0;
  while (lanes_log < 5 && kUnit << lanes_log < width) ++lanes_log;
  return with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    auto* kernel = p.stochastic ? codebook4_quantize_kernel<T, true> : codebook4_quantize_kernel<T, false>;
    const bool aligned = aligned16(p.x) && p.row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    const bool aligned_out = ceil_div(p.k, 2) % 4 == 0 && reinterpret_cast<uintptr_t>(p.packed) % 4 == 0;
    return launch(stream, kernel, ceil_div(p.m * groups, kUnitThreads >> lanes_log), kUnitThreads,
                  sizeof(CodebookShared), p, groups, lanes_log, aligned, aligned_out);
  });
}

}  // namespace bitmill::cuda
