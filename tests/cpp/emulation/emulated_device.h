// SPDX-License-Identifier: Apache-2.0
// cpp/cuda/device.cuh for the emulation: the same functions, by their documentation (PTX ISA 9.0: cp.async, ldmatrix,
// mma fragments). An asynchronous copy is only noted, and done when it is waited for.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <bit>

#include "floats.h"

namespace bitmill::cuda {

template <class T>
T& shared_memory() {
  return *reinterpret_cast<T*>(emulation::block->shared);
}

template <int bytes>
void copy_async(void* shared, const void* global, bool present) {
  static_assert(bytes == 4 || bytes == 16);
  emulation::block->thread->copies.back().push_back({shared, present ? global : nullptr, bytes});
}
inline void close_copies() { emulation::block->thread->copies.emplace_back(); }
template <int groups_left>
void wait_for_copies() {
  emulation::finish_copies(groups_left);
}

inline void load_matrices(uint32_t (&words)[4], const void* shared_row) {
  const int lane = emulation::block->thread->lane;
  emulation::exchange(shared_row, [&](auto of) {
    for (int i = 0; i < 4; ++i) {
      words[i] = static_cast<const uint32_t*>(of(8 * i + lane / 4))[lane % 4];
    }
    return 0;
  });
}

// Every sum of a lane, of the eight words of its row of a and its column of b in their order: add(sum, left, right)
// with what `of_word` makes of two words.
template <class Sum, class OfWord, class Add>
void multiply_words(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], OfWord of_word, Add add) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const int lane = emulation::block->thread->lane, group = lane / 4, in_group = lane % 4;
  emulation::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, [&](auto of) {
    for (int word = 0; word < 8; ++word) {
      const Operands& row = of(group * 4 + word % 4);  // and the row eight below
      const auto upper = of_word(row.a[word / 4 * 2]), lower = of_word(row.a[1 + word / 4 * 2]);
      for (int column = 0; column < 2; ++column) {
        const auto right = of_word(of((2 * in_group + column) * 4 + word % 4).b[word / 4]);
        add(sum[column], upper, right);
        add(sum[2 + column], lower, right);
      }
    }
    return 0;
  });
}

inline void multiply_bits(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto bits = [](uint32_t word) { return word; };
  multiply_words(sum, a, b, bits, [](int32_t& s, uint32_t left, uint32_t right) { s += std::popcount(left & right); });
}

inline void multiply_int8(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto bytes = [](uint32_t word) { return std::bit_cast<std::array<int8_t, 4>>(word); };
  multiply_words(sum, a, b, bytes, [](int32_t& s, const auto& left, const auto& right) {
    for (size_t i = 0; i < left.size(); ++i) s += left[i] * right[i];
  });
}

template <class Half>
inline void multiply_halves(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto floats = [](uint32_t word) {
    const auto halves = std::bit_cast<std::array<Half, 2>>(word);
    return std::array{to_float(halves[0]), to_float(halves[1])};
  };
  multiply_words(sum, a, b, floats, [](float& s, const auto& left, const auto& right) {
    for (size_t i = 0; i < left.size(); ++i) s += left[i] * right[i];
  });
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return to_float(x); }
inline float widen(Float16 x) { return to_float(x); }

}  // namespace bitmill::cuda
