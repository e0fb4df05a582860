// SPDX-License-Identifier: Apache-2.0
// Reading rows of floats.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.cuh"

namespace bitmill::cuda {

// 8 neighbours, of which `left` are inside the row; the others are 0. `aligned`: x is a multiple of 16 bytes.
template <class T>
__device__ inline void load8(const T* x, int64_t left, bool aligned, float (&value)[8]) {
  if (!aligned || left < 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = i < left ? widen(x[i]) : 0.0f;
    return;
  }
  constexpr int kValues = 16 / sizeof(T);
#pragma unroll
  for (int part = 0; part < 8 / kValues; ++part) {
    const uint4 words = reinterpret_cast<const uint4*>(x)[part];
    T values[kValues];
    std::memcpy(values, &words, sizeof words);
#pragma unroll
    for (int i = 0; i < kValues; ++i) value[part * kValues + i] = widen(values[i]);
  }
}

// 4 neighbours as they are; `aligned`: x is a multiple of 4 elements.
template <class T>
__device__ inline void load4(const T* x, int64_t left, bool aligned, T (&value)[4]) {
  if (aligned && left >= 4) {
    using Vector = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
    const Vector words = *reinterpret_cast<const Vector*>(x);
    std::memcpy(value, &words, sizeof words);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = i < left ? x[i] : T{};
}

}  // namespace bitmill::cuda
