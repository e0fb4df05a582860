// SPDX-License-Identifier: Apache-2.0
// Codes of 4 bits to floats: a look-up, and what the value is multiplied with.
#include "codebook4.h"
#include "device.cuh"
#include "launch.cuh"
#include "nvfp4.h"
#include "units.cuh"

namespace bitmill::cuda {
namespace {

// What becomes of a code's value: scale_of(row, column) is that of a unit of 8 columns, apply(value, scale) the result.
struct Unscaled {
  __device__ float scale_of(int64_t, int64_t) const { return 1.0f; }
  __device__ float apply(float value, float) const { return value; }
};
struct Mxfp4Scale {
  const uint8_t* scale;
  int64_t blocks;
  __device__ float scale_of(int64_t row, int64_t column) const {
    return e8m0_to_float(scale[row * blocks + column / kMxBlock]);
  }
  __device__ float apply(float value, float scale) const { return scale * value; }
};
struct Nvfp4Scale {
  const uint8_t* scale;
  const float* global_scale;
  int64_t blocks;
  __device__ float scale_of(int64_t row, int64_t column) const {
    return e4m3_to_float(scale[row * blocks + column / kNvBlock]);
  }
  __device__ float apply(float value, float scale) const {
    return scale * value * (global_scale ? *global_scale : 1.0f);
  }
};
struct GroupScale {
  const float* scale;
  int64_t groups;
  unsigned width;
  __device__ float scale_of(int64_t row, int64_t column) const {
    return scale[row * groups + static_cast<unsigned>(column) / width];
  }
  __device__ float apply(float value, float scale) const { return value * scale; }
};

// The values of the codes: `codebook`, on the device, or `table`. In shared memory, where no two of them meet in a
// bank.
template <class Scale>
__global__ void __launch_bounds__(kUnitThreads)
    fp4_uncast_kernel(const uint8_t* packed, int64_t k, const __grid_constant__ Fp4Table table, const float* codebook,
                      Scale scaling, float* values, UnitGrid grid, bool aligned, bool aligned_out) {
  auto& shared = shared_memory<Fp4Table>();
  if (threadIdx.x < 16) shared.value[threadIdx.x] = codebook ? codebook[threadIdx.x] : table.value[threadIdx.x];
  __syncthreads();
  const Unit unit = unit_of(grid);
  if (!unit.inside) return;
  const int64_t column = kUnit * unit.index, bytes = ceil_div(k, 2);
  const uint32_t codes = load_codes(packed + unit.row * bytes + 4 * unit.index, bytes - 4 * unit.index, aligned);
  const float scale = scaling.scale_of(unit.row, column);
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = scaling.apply(shared.value[codes >> 4 * i & 15u], scale);
  store8(values + unit.row * k + column, k - column, aligned_out, value);
}

template <class Scale>
Status uncast(const uint8_t* packed, int64_t m, int64_t k, const Fp4Table& table, const float* codebook, Scale scaling,
              float* values, Stream stream) {
  if (m < 0 || k < 0 || k > kMaxColumns) return Status::bad_size;
  if (m == 0 || k == 0) return Status::ok;
  const UnitGrid grid(m, k);
  const bool aligned = ceil_div(k, 2) % 4 == 0 && reinterpret_cast<uintptr_t>(packed) % 4 == 0;
  return launch(stream, fp4_uncast_kernel<Scale>, grid.blocks(), kUnitThreads, sizeof(Fp4Table), packed, k, table,
                codebook, scaling, values, grid, aligned, aligned16(values) && k % 4 == 0);
}

__global__ void __launch_bounds__(kUnitThreads)
    e8m0_uncast_kernel(const uint8_t* bytes, int64_t count, float* values, UnitGrid grid, bool aligned) {
  const Unit unit = unit_of(grid);
  const int64_t first = kUnit * unit.index;
  if (first >= count) return;
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = first + i < count ? e8m0_to_float(bytes[first + i]) : 0.0f;
  store8(values + first, count - first, aligned, value);
}

}  // namespace

Status launch_fp4_uncast(const uint8_t* packed, int64_t m, int64_t k, Fp4Format format, float* values, Stream stream) {
  return uncast(packed, m, k, fp4_table(format), nullptr, Unscaled{}, values, stream);
}

Status launch_mxfp4_dequantize(const uint8_t* packed, const uint8_t* scale, int64_t m, int64_t k, float* values,
                               Stream stream) {
  return uncast(packed, m, k, fp4_table(kE2M1), nullptr, Mxfp4Scale{scale, ceil_div(k, kMxBlock)}, values, stream);
}

Status launch_nvfp4_dequantize(const Nvfp4DequantizeParams& p, Stream stream) {
  const Nvfp4Scale scale{p.scale, p.global_scale, ceil_div(p.k, kNvBlock)};
  return uncast(p.packed, p.m, p.k, fp4_table(kE2M1), nullptr, scale, p.values, stream);
}

Status launch_codebook4_dequantize(const Codebook4DequantizeParams& p, Stream stream) {
  if (p.group_size < 0 || p.group_size % 8 != 0) return Status::bad_argument;
  const int64_t groups = p.group_size > 0 ? ceil_div(p.k, p.group_size) : 1;
  const auto width = static_cast<unsigned>(p.group_size > 0 && p.group_size < p.k ? p.group_size : p.k);
  return uncast(p.packed, p.m, p.k, Fp4Table{}, p.codebook, GroupScale{p.scale, groups, width}, p.values, stream);
}

Status launch_e8m0_uncast(const uint8_t* bytes, int64_t count, float* values, Stream stream) {
  if (count < 0) return Status::bad_size;
  if (count == 0) return Status::ok;
  const UnitGrid grid(1, count);
  return launch(stream, e8m0_uncast_kernel, grid.blocks(), kUnitThreads, 0, bytes, count, values, grid,
                aligned16(values));
}

}  // namespace bitmill::cuda
