// SPDX-License-Identifier: Apache-2.0
// Large products of bits on Hopper's asynchronous tensor cores (wgmma and.popc), which count the bits of s & w as
// binary_matmul_mma.cu does. The weight is the left operand, which may come from registers: a word of 16 outputs lies
// in a tile as a fragment wants it. Rows are the right one, read by TMA into shared memory, where the tensor cores find
// them. A block has 128 outputs and 128 rows; stages of 1024 columns go round between warps of three kinds: one warp
// that copies, four that count the bits of rows, and two groups of four that multiply 64 outputs each.
#include "binary_matmul_mma.cuh"
#include "hopper.cuh"
#include "launch.cuh"

#ifdef BITMILL_WGMMA
namespace bitmill::cuda {
namespace {

constexpr int kMultiplyWarps = 8, kCountWarps = 4;
constexpr int kThreads = 32 * (kMultiplyWarps + kCountWarps + 1);
constexpr int kOutputs = 128, kRows = 128;
constexpr int kWords = 32;  // columns of a stage, in words: as wide as the swizzle of 128 bytes
constexpr int kStages = 4;
constexpr int kTiles = kOutputs / static_cast<int>(kTileRows);

struct Stage {
  uint32_t rows[kRows][kWords];  // 16 bytes at place c of row r are at c ^ r % 8; begins at a multiple of 1024 bytes
  uint32_t weight[kTiles][kWords][kTileRows];
};
struct Shared {
  union {
    Stage stage[kStages];
    int32_t sum[kRows][kOutputs + 8];  // when the stages have been used
  };
  int32_t row_count[kRows];
  int32_t output_count[kOutputs];
  PhaseBarrier full[kStages], empty[kStages];
};
constexpr size_t kAlignment = 1024;

#ifdef BITMILL_ON_HOPPER

constexpr int kSteps = kWords / 8;  // of 256 columns
constexpr unsigned kRowBytes = kRows * kWords * 4;

// Which stage is meant, and the parity of its phase.
struct Place {
  int stage;
  unsigned parity;
  explicit __device__ Place(int64_t number)
      : stage(static_cast<int>(number % kStages)), parity(static_cast<unsigned>(number / kStages % 2)) {}
};

__device__ void copy_stages(const BinaryMatmulParams& p, const WordMatrix& matrix, Shared& shared, int64_t first_row,
                            int64_t first_tile, int64_t stages) {
  const int64_t words = word_count(p.k), left = tile_count(p.n) - first_tile;
  const int tiles = left < kTiles ? static_cast<int>(left) : kTiles;
  for (int64_t i = 0; i < stages; ++i) {
    const Place place(i);
    wait(shared.empty[place.stage], place.parity ^ 1u);  // the first time round nothing is waited for
    Stage& stage = shared.stage[place.stage];
    PhaseBarrier& full = shared.full[place.stage];
    const int64_t word = i * kWords;
    const auto bytes = static_cast<unsigned>((words - word < kWords ? words - word : kWords) * kTileRows * 4);
    arrive_for_bytes(full, kRowBytes + static_cast<unsigned>(tiles) * bytes);
    copy_box(stage.rows, matrix, static_cast<int>(word), static_cast<int>(first_row), full);
    for (int tile = 0; tile < tiles; ++tile) {
      copy_bytes(stage.weight[tile], p.weight + ((first_tile + tile) * words + word) * kTileRows, bytes, full);
    }
  }
}

__device__ void count_rows(Shared& shared, int row, int64_t stages) {
  int32_t count = 0;
  for (int64_t i = 0; i < stages; ++i) {
    const Place place(i);
    wait(shared.full[place.stage], place.parity);
#pragma unroll
    for (int c = 0; c < kWords / 4; ++c) {  // the swizzle keeps all 16 bytes of a row in it, and lanes apart
      const uint4 words = *reinterpret_cast<const uint4*>(shared.stage[place.stage].rows[row] + 4 * (c ^ row % 8));
      count += __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
    }
    __syncwarp();
    if (row % 32 == 0) arrive(shared.empty[place.stage]);
  }
  shared.row_count[row] = count;
}

template <Operand operand>
__device__ void multiply_stages(const BinaryMatmulParams& p, Shared& shared, int warp, int lane, int64_t stages,
                                int32_t (&sum)[64]) {
  const int group = lane / 4, in_group = lane % 4;
  const int64_t words = word_count(p.k);
  int32_t count[2] = {};  // of outputs `group` and `group` + 8
  for (int64_t i = 0; i < stages; ++i) {
    const Place place(i);
    wait(shared.full[place.stage], place.parity);
    const Stage& stage = shared.stage[place.stage];
    uint32_t a[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int word = 8 * step + in_group + j / 2 * 4;
        const bool inside = i * kWords + word < words;  // past it lies what an earlier stage left
        a[step][j] = inside ? stage.weight[warp][word][group + j % 2 * 8] : 0u;
        if (operand == Operand::sign) count[j % 2] += __popc(a[step][j]);
      }
    }
    const Box rows = box_at(stage.rows);
    begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) multiply_box(sum, a[step], rows, step);
    end_products();
    if (lane == 0) arrive(shared.empty[place.stage]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    count[half] += __shfl_xor_sync(kAllLanes, count[half], 1);
    count[half] += __shfl_xor_sync(kAllLanes, count[half], 2);
    if (in_group == 0) shared.output_count[16 * warp + group + 8 * half] = count[half];
  }
}

#endif

template <Operand operand>
__global__ void __launch_bounds__(kThreads)
    binary_matmul_wgmma_kernel(BinaryMatmulParams p, const __grid_constant__ WordMatrix matrix) {
#ifdef BITMILL_ON_HOPPER
  auto* const memory = &shared_memory<unsigned char>();
  const size_t past = reinterpret_cast<uintptr_t>(memory) % kAlignment;  // shared memory begins at a multiple
  auto& shared = *reinterpret_cast<Shared*>(memory + (past ? kAlignment - past : 0));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const auto blocks_across = static_cast<unsigned>(ceil_div(p.n, kOutputs));
  const int64_t first_row = int64_t{blockIdx.x / blocks_across} * kRows;
  const int64_t first_output = int64_t{blockIdx.x % blocks_across} * kOutputs;
  const int64_t stages = ceil_div(word_count(p.k), kWords);
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared.full[i], 1);
      init_barrier(shared.empty[i], kMultiplyWarps + kCountWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  int32_t sum[64] = {};
  if (warp < kMultiplyWarps) {
    multiply_stages<operand>(p, shared, warp, lane, stages, sum);
  } else if (warp < kMultiplyWarps + kCountWarps) {
    count_rows(shared, thread - 32 * kMultiplyWarps, stages);
  } else if (lane == 0) {
    copy_stages(p, matrix, shared, first_row, first_output / kTileRows, stages);
  }
  __syncthreads();  // all stages have been used
  if (warp < kMultiplyWarps) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      shared.sum[i / 4 * 8 + lane % 4 * 2 + i % 2][16 * warp + lane / 4 + i % 4 / 2 * 8] = sum[i];
    }
  }
  __syncthreads();
  store_counts<operand, kThreads>(p, first_row, first_output, shared.sum, shared.row_count, shared.output_count);
#else
  __trap();  // never chosen for other GPUs
#endif
}

template <Operand operand>
Status start(const BinaryMatmulParams& p, Stream stream) {
  WordMatrix rows;
  if (!describe(p.a, p.m, word_count(p.k), kRows, rows)) return launch_binary_matmul_mma(p, stream);
  const int64_t blocks = ceil_div(p.m, kRows) * ceil_div(p.n, kOutputs);
  return launch(stream, binary_matmul_wgmma_kernel<operand>, blocks, kThreads, sizeof(Shared) + kAlignment, p, rows);
}

}  // namespace

bool multiplies_wgmma(const BinaryMatmulParams& p) {
  constexpr int64_t kFewestColumns = 2048;
  if (p.operand == Operand::ternary || p.k < kFewestColumns) return false;
  if (word_count(p.k) % 4 != 0 || !aligned16(p.a) || p.m > INT32_MAX) return false;  // TMA
  return ceil_div(p.m, kRows) * ceil_div(p.n, kOutputs) >= current_device().multiprocessors;
}

Status launch_binary_matmul_wgmma(const BinaryMatmulParams& p, Stream stream) {
  return p.operand == Operand::bool_ ? start<Operand::bool_>(p, stream) : start<Operand::sign>(p, stream);
}

}  // namespace bitmill::cuda
#endif
