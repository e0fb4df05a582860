// SPDX-License-Identifier: Apache-2.0
// cpp/cuda/hopper.cuh for the emulation: the same functions, by their documentation (PTX ISA 9.0: mbarrier, bulk
// copies, tensor maps, wgmma). A copy is only noted, and done when somebody waits for it.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "emulated_device.h"

namespace bitmill::cuda {

struct WordMatrix {
  const int32_t* words;
  int64_t height, width;
  unsigned rows;
};

struct PhaseBarrier {
  struct Coming {
    unsigned char* to;
    const void* from;  // or null: a box
    unsigned bytes;
    WordMatrix matrix;
    int word, row;
  };
  unsigned arrivals, arrived, phase;
  int64_t bytes;  // announced, and not there yet
  int count;
  Coming coming[16];
};

inline void init_barrier(PhaseBarrier& barrier, unsigned arrivals) { barrier = {arrivals, 0, 0, 0, 0, {}}; }
inline void publish_barriers() {}

inline void finish_phase(PhaseBarrier& barrier) {
  if (barrier.arrived < barrier.arrivals || barrier.bytes != 0) return;
  barrier.arrived = 0;
  ++barrier.phase;
}
inline void arrive(PhaseBarrier& barrier) {
  ++barrier.arrived;
  finish_phase(barrier);
}
inline void arrive_for_bytes(PhaseBarrier& barrier, unsigned bytes) {
  barrier.bytes += bytes;
  arrive(barrier);
}

inline void bring(const PhaseBarrier::Coming& coming) {
  if (coming.from) {
    std::memcpy(coming.to, coming.from, coming.bytes);
    return;
  }
  const WordMatrix& m = coming.matrix;
  for (unsigned r = 0; r < m.rows; ++r) {
    for (unsigned w = 0; w < 32; ++w) {
      const int64_t row = coming.row + int64_t{r}, word = coming.word + int64_t{w};
      const int32_t value = row < m.height && word < m.width ? m.words[row * m.width + word] : 0;
      std::memcpy(coming.to + 128 * r + 16 * (w / 4 ^ r % 8) + w % 4 * 4, &value, sizeof value);
    }
  }
}

inline void wait(PhaseBarrier& barrier, unsigned parity) {
  for (int tries = 0; (barrier.phase & 1u) == parity; ++tries) {
    for (int i = 0; i < barrier.count; ++i) {
      bring(barrier.coming[i]);
      barrier.bytes -= barrier.coming[i].bytes;
    }
    if (barrier.count > 0) {
      barrier.count = 0;
      finish_phase(barrier);
      continue;
    }
    if (tries > 1'000'000) {
      std::fprintf(stderr, "a thread waits for a phase that is never over\n");
      std::abort();
    }
    emulation::pause();
  }
}

inline void note(PhaseBarrier& barrier, const PhaseBarrier::Coming& coming) {
  if (barrier.count == 16) std::abort();
  barrier.coming[barrier.count++] = coming;
}

inline bool describe(const int32_t* words, int64_t height, int64_t width, unsigned rows, WordMatrix& matrix) {
  matrix = {words, height, width, rows};
  return reinterpret_cast<uintptr_t>(words) % 16 == 0 && width % 4 == 0;
}
inline void copy_box(void* to, const WordMatrix& matrix, int word, int row, PhaseBarrier& barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 1024 != 0) std::abort();
  note(barrier, {static_cast<unsigned char*>(to), nullptr, matrix.rows * 128, matrix, word, row});
}
inline void copy_bytes(void* to, const void* from, unsigned bytes, PhaseBarrier& barrier) {
  if (bytes % 16 != 0) std::abort();
  note(barrier, {static_cast<unsigned char*>(to), from, bytes, {}, 0, 0});
}

using Box = const unsigned char*;
inline Box box_at(const void* shared) { return static_cast<Box>(shared); }
inline void begin_products() { __syncwarp(); }
inline void end_products() { __syncwarp(); }  // no lane of a warp goes on before the products are there

inline void multiply_box(int32_t (&sum)[64], const uint32_t (&a)[4], Box rows, int step) {
  struct Operand {
    uint32_t a[4];
  };
  const int lane = emulation::block->thread->lane, group = lane / 4, in_group = lane % 4;
  uint32_t left[2][8];
  emulation::exchange(Operand{{a[0], a[1], a[2], a[3]}}, [&](auto of) {
    for (int word = 0; word < 8; ++word) {
      for (int half = 0; half < 2; ++half) left[half][word] = of(group * 4 + word % 4).a[half + word / 4 * 2];
    }
    return 0;
  });
  for (int i = 0; i < 64; i += 4) {
    for (int column = 0; column < 2; ++column) {
      const int row = i / 4 * 8 + 2 * in_group + column;
      for (int word = 0; word < 8; ++word) {
        const int place = 8 * step + word;
        const auto right =
            *reinterpret_cast<const uint32_t*>(rows + 128 * row + 16 * (place / 4 ^ row % 8) + place % 4 * 4);
        for (int half = 0; half < 2; ++half) {
          sum[i + 2 * half + column] += std::popcount(left[half][word] & right);
        }
      }
    }
  }
}

}  // namespace bitmill::cuda
