// SPDX-License-Identifier: Apache-2.0
// Products of bits on the tensor cores, which count the bits of s & w. Over all columns, whose padding is 0:
//   sign    . weight:  k - 2 pc(s) - 2 pc(w) + 4 pc(s & w)
//   bool    . weight:  2 pc(s & w) - pc(s)
//   ternary . weight:  2 (pc(s & z & w) + pc(~s & z & ~w)) - pc(z)
// (the xor form, with one term less, is emulated on compute capability 9). Four warps share a block of outputs; stages
// of 512 columns are copied ahead of their use, and the counts of single rows are taken from them in passing.
#include "binary_matmul_mma.cuh"
#include "binary_output.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace bitmill::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 4;
constexpr int kWords = 16;  // columns of a stage, in words

// m_fragments of 16 rows and n_fragments of 8 columns a warp; two by two warps.
template <Operand operand, int m_fragments, int n_fragments>
struct BlockShape {
  static constexpr int kPlanes = operand == Operand::ternary ? 2 : 1;
  static constexpr int kRows = 32 * m_fragments, kColumns = 16 * n_fragments;
  static constexpr int kTiles = kColumns / kTileRows;

  // 16 bytes of a row, and of a word of 16 columns, change places so that no two lanes that read together meet in a
  // bank.
  struct Stage {
    uint32_t a[kPlanes][kRows][kWords];
    uint32_t weight[kTiles][kWords][kTileRows];
  };
  struct Shared {
    union {
      Stage stage[kStages];
      int32_t sum[kRows][kColumns + 8];  // when the stages have been used
    };
    int32_t row_count[kRows];
    int32_t column_count[kColumns];
  };
  static __device__ int place_of_chunk(int row, int chunk) { return 4 * (chunk ^ (row >> 1 & 3)); }
  static __device__ int place_of_lane(int word, int lane) { return lane ^ (word >> 1 & 1) * 8; }
};

template <class Shape>
__device__ void copy_stage(const BinaryMatmulParams& p, typename Shape::Stage& stage, int64_t first_row,
                           int64_t first_tile, int64_t first_word, bool aligned) {
  const int64_t words = word_count(p.k);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int plane = 0; plane < Shape::kPlanes; ++plane) {
    const int32_t* a = plane == 0 ? p.a : p.a_nonzero;
#pragma unroll
    for (int i = thread; i < Shape::kRows * kWords / 4; i += kThreads) {
      const int row = i / (kWords / 4), chunk = i % (kWords / 4);
      uint32_t* to = stage.a[plane][row] + Shape::place_of_chunk(row, chunk);
      const int64_t word = first_word + 4 * chunk, left = first_row + row < p.m ? words - word : 0;
      const int32_t* from = left > 0 ? a + (first_row + row) * words + word : a;
      if (aligned) {
        copy_async<16>(to, from, left > 0);
      } else {
        for (int j = 0; j < 4; ++j) copy_async<4>(to + j, j < left ? from + j : from, j < left);
      }
    }
  }
#pragma unroll
  for (int i = thread; i < Shape::kColumns * kWords / 4; i += kThreads) {
    const int tile = i / (4 * kWords), word = i / 4 % kWords, lane = i % 4 * 4;
    const bool present = first_tile + tile < tile_count(p.n) && first_word + word < words;
    const int64_t at = ((first_tile + tile) * words + first_word + word) * kTileRows + lane;
    copy_async<16>(stage.weight[tile][word] + Shape::place_of_lane(word, lane), p.weight + (present ? at : 0), present);
  }
}

template <class Shape, Operand operand, int m_fragments, int n_fragments>
__device__ void multiply_stage(const typename Shape::Stage& stage, int32_t (&sum)[m_fragments][n_fragments][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int group = lane / 4, in_group = lane % 4;
  const int first_row = warp / 2 * 16 * m_fragments, first_column = warp % 2 * 8 * n_fragments;
#pragma unroll
  for (int part = 0; part < kWords / 8; ++part) {
    uint32_t b[n_fragments][2];
#pragma unroll
    for (int j = 0; j < n_fragments; ++j) {
      const int column = first_column + 8 * j + group;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int word = 8 * part + 4 * half + in_group;
        b[j][half] = stage.weight[column / kTileRows][word][Shape::place_of_lane(word, column % kTileRows)];
      }
    }
#pragma unroll
    for (int i = 0; i < m_fragments; ++i) {
      const int row = first_row + 16 * i + lane % 16;
      const int place = Shape::place_of_chunk(row, 2 * part + lane / 16);
      uint32_t a[4];
      load_matrices(a, stage.a[0][row] + place);
      if constexpr (operand == Operand::ternary) {
        uint32_t negative[4];
        load_matrices(negative, stage.a[1][row] + place);  // nonzero bits so far
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const uint32_t positive = a[word] & negative[word];
          negative[word] &= ~a[word];
          a[word] = positive;
        }
#pragma unroll
        for (int j = 0; j < n_fragments; ++j) {
          const uint32_t opposite[2] = {~b[j][0], ~b[j][1]};
          multiply_bits(sum[i][j], negative, opposite);
        }
      }
#pragma unroll
      for (int j = 0; j < n_fragments; ++j) multiply_bits(sum[i][j], a, b[j]);
    }
  }
}

// The bits of the row and of the column of this thread's number: nonzero bits of ternary rows, otherwise signs.
template <class Shape, Operand operand>
__device__ void count_stage(const typename Shape::Stage& stage, int32_t& row_count, int32_t& column_count) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < Shape::kRows) {
#pragma unroll
    for (int chunk = 0; chunk < kWords / 4; ++chunk) {
      const auto* place = stage.a[Shape::kPlanes - 1][thread] + Shape::place_of_chunk(thread, chunk);
      const uint4 words = *reinterpret_cast<const uint4*>(place);
      row_count += __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
    }
  }
  if (operand == Operand::sign && thread < Shape::kColumns) {
    const int tile = thread / kTileRows, lane = thread % kTileRows;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int word = i ^ (tile & 1);  // neighbouring tiles begin in different banks
      column_count += __popc(stage.weight[tile][word][Shape::place_of_lane(word, lane)]);
    }
  }
}

template <Operand operand, int m_fragments, int n_fragments>
__global__ void __launch_bounds__(kThreads) binary_matmul_mma_kernel(BinaryMatmulParams p, bool aligned) {
  using Shape = BlockShape<operand, m_fragments, n_fragments>;
  auto& shared = shared_memory<typename Shape::Shared>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const auto blocks_across = static_cast<unsigned>(ceil_div(p.n, Shape::kColumns));
  const int64_t first_row = int64_t{blockIdx.x / blocks_across} * Shape::kRows;
  const int64_t first_column = int64_t{blockIdx.x % blocks_across} * Shape::kColumns;
  const int64_t stages = ceil_div(word_count(p.k), kWords);
  const auto copy = [&](int64_t stage) {
    if (stage < stages) {
      copy_stage<Shape>(p, shared.stage[stage % kStages], first_row, first_column / kTileRows, stage * kWords, aligned);
    }
    close_copies();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);
  int32_t sum[m_fragments][n_fragments][4] = {};
  int32_t row_count = 0, column_count = 0;
  for (int64_t stage = 0; stage < stages; ++stage) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this stage is there for all threads, and all have used the one before it
    copy(stage + kStages - 1);
    multiply_stage<Shape, operand, m_fragments, n_fragments>(shared.stage[stage % kStages], sum);
    count_stage<Shape, operand>(shared.stage[stage % kStages], row_count, column_count);
  }
  __syncthreads();

  if (thread < Shape::kRows) shared.row_count[thread] = row_count;
  if (thread < Shape::kColumns) shared.column_count[thread] = column_count;
#pragma unroll
  for (int i = 0; i < m_fragments; ++i) {
#pragma unroll
    for (int j = 0; j < n_fragments; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = warp / 2 * 16 * m_fragments + 16 * i + lane / 4 + c / 2 * 8;
        const int column = warp % 2 * 8 * n_fragments + 8 * j + lane % 4 * 2 + c % 2;
        shared.sum[row][column] = sum[i][j][c];
      }
    }
  }
  __syncthreads();

  store_counts<operand, kThreads>(p, first_row, first_column, shared.sum, shared.row_count, shared.column_count);
}

template <Operand operand, int m_fragments, int n_fragments>
Status start(const BinaryMatmulParams& p, Stream stream) {
  using Shape = BlockShape<operand, m_fragments, n_fragments>;
  const bool aligned = word_count(p.k) % 4 == 0 && aligned16(p.a) && aligned16(p.a_nonzero);
  const int64_t blocks = ceil_div(p.m, Shape::kRows) * ceil_div(p.n, Shape::kColumns);
  return launch(stream, binary_matmul_mma_kernel<operand, m_fragments, n_fragments>, blocks, kThreads,
                sizeof(typename Shape::Shared), p, aligned);
}

template <Operand operand>
Status start(const BinaryMatmulParams& p, Stream stream) {
  constexpr int n_fragments = operand == Operand::ternary ? 4 : 8;  // as far as the registers go
  using Large = BlockShape<operand, 4, n_fragments>;
  const int64_t blocks = ceil_div(p.m, Large::kRows) * ceil_div(p.n, Large::kColumns);
  return blocks < current_device().multiprocessors ? start<operand, 2, 4>(p, stream)
                                                   : start<operand, 4, n_fragments>(p, stream);
}

}  // namespace

Status launch_binary_matmul_mma(const BinaryMatmulParams& p, Stream stream) {
  switch (p.operand) {
    case Operand::sign:
      return start<Operand::sign>(p, stream);
    case Operand::ternary:
      return start<Operand::ternary>(p, stream);
    case Operand::bool_:
      return start<Operand::bool_>(p, stream);
  }
  return Status::bad_argument;
}

}  // namespace bitmill::cuda
