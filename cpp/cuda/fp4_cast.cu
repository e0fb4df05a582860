// SPDX-License-Identifier: Apache-2.0
// Casts to 4-bit floats, by core's functions of a value: alone, in blocks of 32 columns with an E8M0 scale (MXFP4), and
// in blocks of 16 with an E4M3 scale (NVFP4). Neighbouring threads share a block.
#include "device.cuh"
#include "launch.cuh"
#include "nvfp4.h"
#include "units.cuh"

namespace bitmill::cuda {
namespace {

// How a value becomes a code.
struct Coding {
  Fp4Steps steps;
  Fp4Distances distances;
  RandomStream random;
  explicit Coding(Fp4Format format, Rounding rounding, RandomStream stream)
      : steps(fp4_steps(format, rounding)), distances(fp4_distances(format)), random(stream) {}
};

// The distances stand in shared memory: 16 floats, so that no two lanes that look up different ones meet in a bank.
template <bool stochastic>
__device__ const Fp4Distances& shared_distances(const Coding& coding) {
  auto& shared = shared_memory<Fp4Distances>();
  if constexpr (stochastic) {
    if (threadIdx.x == 0) shared = coding.distances;
    __syncthreads();
  }
  return shared;
}

// Codes of 8 neighbours, the first of which is element `first`; NaN is 7.
template <bool stochastic>
__device__ uint32_t codes_of(const float (&x)[8], const Coding& coding, const Fp4Distances& distances, int64_t first) {
  uint32_t random[8] = {}, codes = 0;
  if constexpr (stochastic) random_words(coding.random, static_cast<uint64_t>(first), random);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    uint32_t code = fp4_code(bits, coding.steps);
    if constexpr (stochastic) code = fp4_round_up(code, bits, distances, random[i]);
    codes |= code << 4 * i;
  }
  return codes;
}

template <class T, bool stochastic>
__global__ void __launch_bounds__(kUnitThreads)
    fp4_cast_kernel(Fp4CastParams p, const __grid_constant__ Coding coding, UnitGrid grid, bool aligned,
                    bool aligned_out, int32_t* found) {
  const Fp4Distances& distances = shared_distances<stochastic>(coding);
  const Unit unit = unit_of(grid);
  if (!unit.inside) return;
  const int64_t column = kUnit * unit.index, left = p.k - column, bytes = ceil_div(p.k, 2);
  float x[8];
  load8(static_cast<const T*>(p.x) + unit.row * p.row_stride + column, left, aligned, x);
  uint32_t nan = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) nan |= x[i] != x[i] ? 15u << 4 * i : 0u;
  uint32_t codes = codes_of<stochastic>(x, coding, distances, unit.row * p.k + column);
  if (nan) {
    codes = (codes & ~nan) | (p.nan == NanPolicy::max ? nan & 0x77777777u : 0u);
    if (found) *found = 1;
  }
  store_codes(p.packed + unit.row * bytes + 4 * unit.index, bytes - 4 * unit.index, aligned_out, codes);
}

// What differs between formats of blocks: how wide one is, and its scale.
struct Mxfp4Blocks {
  static constexpr int kWidth = kMxBlock;
  ScaleRule rule;
  __device__ ScaledBlock scaled(uint32_t amax) const { return mxfp4_scaled(amax, rule); }
};
struct Nvfp4Blocks {
  static constexpr int kWidth = kNvBlock;
  const float* global_scale;
  __device__ ScaledBlock scaled(uint32_t amax) const { return nvfp4_scaled(amax, global_scale ? *global_scale : 1.0f); }
};

template <class T, bool stochastic, class Params, class Blocks>
__global__ void __launch_bounds__(kUnitThreads)
    fp4_blocks_kernel(Params p, Blocks blocks, const __grid_constant__ Coding coding, UnitGrid grid, bool aligned,
                      bool aligned_out) {
  constexpr int kUnits = Blocks::kWidth / kUnit;
  const Fp4Distances& distances = shared_distances<stochastic>(coding);
  const Unit unit = unit_of(grid);
  const int64_t column = kUnit * unit.index, left = unit.inside ? p.k - column : 0, bytes = ceil_div(p.k, 2);
  float x[8];
  load8(static_cast<const T*>(p.x) + (left > 0 ? unit.row * p.row_stride + column : 0), left, aligned, x);
  const ScaledBlock scaled = blocks.scaled(largest_of_lanes(largest_magnitude(x), kUnits));
  if (!unit.inside) return;
  if (unit.index % kUnits == 0) p.scale[unit.row * (grid.units / kUnits) + unit.index / kUnits] = scaled.byte;
#pragma unroll
  for (float& value : x) value *= scaled.inverse;
  const uint32_t codes = codes_of<stochastic>(x, coding, distances, unit.row * p.k + column);
  store_codes(p.packed + unit.row * bytes + 4 * unit.index, bytes - 4 * unit.index, aligned_out,
              scaled.valid ? codes : 0u);
}

template <class T>
bool aligned_rows(const void* x, int64_t stride) {
  return aligned16(x) && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}
bool aligned_codes(const uint8_t* packed, int64_t k) {
  return ceil_div(k, 2) % 4 == 0 && reinterpret_cast<uintptr_t>(packed) % 4 == 0;
}

template <class Params, class Blocks>
Status quantize_blocks(const Params& p, Blocks blocks, Stream stream) {
  if (p.m < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.m == 0 || p.k == 0) return Status::ok;
  const Coding coding(kE2M1, p.rounding, p.random);
  const UnitGrid grid(p.m, p.k, Blocks::kWidth / kUnit);
  return with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    auto* kernel = p.rounding == Rounding::stochastic ? fp4_blocks_kernel<T, true, Params, Blocks>
                                                      : fp4_blocks_kernel<T, false, Params, Blocks>;
    return launch(stream, kernel, grid.blocks(), kUnitThreads, sizeof(Fp4Distances), p, blocks, coding, grid,
                  aligned_rows<T>(p.x, p.row_stride), aligned_codes(p.packed, p.k));
  });
}

template <class T>
__global__ void __launch_bounds__(kUnitThreads)
    e8m0_cast_kernel(const T* x, int64_t count, bool up, uint8_t* bytes, UnitGrid grid) {
  const Unit unit = unit_of(grid);
  const int64_t first = kUnit * unit.index;
  for (int64_t i = first; i < first + kUnit && i < count; ++i) {
    bytes[i] = e8m0_from_bits(std::bit_cast<uint32_t>(widen(x[i])), up);
  }
}

}  // namespace

Status launch_fp4_cast(const Fp4CastParams& p, Stream stream, int32_t* found) {
  if (p.m < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  const bool looks = p.nan == NanPolicy::error;
  if (p.m == 0 || p.k == 0) return Status::ok;
  if (looks) {
    if (const Status status = clear_number(found, stream); status != Status::ok) return status;
  }
  const Coding coding(p.format, p.rounding, p.random);
  const UnitGrid grid(p.m, p.k);
  const Status status = with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    auto* kernel = p.rounding == Rounding::stochastic ? fp4_cast_kernel<T, true> : fp4_cast_kernel<T, false>;
    return launch(stream, kernel, grid.blocks(), kUnitThreads, sizeof(Fp4Distances), p, coding, grid,
                  aligned_rows<T>(p.x, p.row_stride), aligned_codes(p.packed, p.k), looks ? found : nullptr);
  });
  if (!looks || status != Status::ok) return status;
  int32_t any_nan = 0;
  if (const Status read = read_number(any_nan, found, stream); read != Status::ok) return read;
  return any_nan ? Status::bad_argument : Status::ok;
}

Status launch_mxfp4_quantize(const Mxfp4QuantizeParams& p, Stream stream) {
  return quantize_blocks(p, Mxfp4Blocks{p.rule}, stream);
}

Status launch_nvfp4_quantize(const Nvfp4QuantizeParams& p, Stream stream) {
  return quantize_blocks(p, Nvfp4Blocks{p.global_scale}, stream);
}

Status launch_e8m0_cast(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes, Stream stream) {
  if (count < 0) return Status::bad_size;
  if (count == 0) return Status::ok;
  const UnitGrid grid(1, count);
  return with_dtype(dtype, x, [&]<class T>(const T* values) {
    return launch(stream, e8m0_cast_kernel<T>, grid.blocks(), kUnitThreads, 0, values, count, up, bytes, grid);
  });
}

}  // namespace bitmill::cuda
