// SPDX-License-Identifier: Apache-2.0
// Binary products with NEON: cnt counts the bits of bytes, and 4 rows x 1 tile of byte counts stay in registers. A
// 32-bit lane is an output, so the four bytes of a lane are added only when they are widened. Bit-equal to the generic
// form, epilogue included. No weight is 0 here (zero_weights.h).
#include "binary_tiles.h"
#include "neon.h"

namespace bitmill::detail {
namespace {

constexpr int kColumns = kTileRows;
constexpr int64_t kByteWords = 31;  // words that a byte can count: 31 * 8 < 256

struct Row {  // named, not an array: g++ keeps an indexed array of accumulators in memory
  uint8x16_t c0, c1, c2, c3;
};

template <bool masked>
void count(uint8x16_t& sum, uint32x4_t a, uint32x4_t nonzero, uint32x4_t weight) {
  uint32x4_t bits = veorq_u32(a, weight);
  if constexpr (masked) bits = vandq_u32(bits, nonzero);
  sum = vaddq_u8(sum, vcntq_u8(vreinterpretq_u8_u32(bits)));
  asm volatile("" : "+w"(sum));  // keeps the steps of one output together; otherwise g++ runs out of registers
}

template <bool masked>
void step(Row& row, int32_t a, int32_t nonzero, uint32x4_t w0, uint32x4_t w1, uint32x4_t w2, uint32x4_t w3) {
  const uint32x4_t bits = vdupq_n_u32(static_cast<uint32_t>(a));
  const uint32x4_t present = masked ? vdupq_n_u32(static_cast<uint32_t>(nonzero)) : bits;
  count<masked>(row.c0, bits, present, w0);
  count<masked>(row.c1, bits, present, w1);
  count<masked>(row.c2, bits, present, w2);
  count<masked>(row.c3, bits, present, w3);
}

void widen(Row counts, bool first, int32_t* opposite) {
  const auto put = [&](int i, uint8x16_t bytes) {
    const uint16x8_t halves = vpaddlq_u8(bytes);
    const uint32x4_t before = vreinterpretq_u32_s32(vld1q_s32(opposite + i));
    vst1q_s32(opposite + i, vreinterpretq_s32_u32(first ? vpaddlq_u16(halves) : vpadalq_u16(before, halves)));
  };
  put(0, counts.c0);
  put(4, counts.c1);
  put(8, counts.c2);
  put(12, counts.c3);
}

// The opposite bits of `rows` rows over words [begin, end).
template <int rows, bool masked>
void count(const BinaryTask& task, int64_t row, const uint32_t* tile, int64_t begin, int64_t end,
           int32_t (&opposite)[rows][kColumns]) {
  const BinaryMatmulParams& p = task.p;
  const int64_t next = task.words;
  const int32_t* a = p.a + row * next;
  const int32_t* nonzero = masked && p.operand == Operand::ternary ? p.a_nonzero + row * next : a;
  for (int64_t part = begin; part < end; part += kByteWords) {
    const int64_t part_end = part + kByteWords < end ? part + kByteWords : end;
    const uint8x16_t zero = vdupq_n_u8(0);
    Row r0{zero, zero, zero, zero}, r1 = r0, r2 = r0, r3 = r0;
    for (int64_t w = part; w < part_end; ++w) {
      const uint32_t* weight = tile + w * kTileRows;
      const uint32x4_t w0 = vld1q_u32(weight), w1 = vld1q_u32(weight + 4);
      const uint32x4_t w2 = vld1q_u32(weight + 8), w3 = vld1q_u32(weight + 12);
      step<masked>(r0, a[w], nonzero[w], w0, w1, w2, w3);
      if constexpr (rows > 1) {
        step<masked>(r1, a[w + next], nonzero[w + next], w0, w1, w2, w3);
        step<masked>(r2, a[w + 2 * next], nonzero[w + 2 * next], w0, w1, w2, w3);
        step<masked>(r3, a[w + 3 * next], nonzero[w + 3 * next], w0, w1, w2, w3);
      }
    }
    widen(r0, part == begin, opposite[0]);
    if constexpr (rows > 1) {
      widen(r1, part == begin, opposite[1]);
      widen(r2, part == begin, opposite[2]);
      widen(r3, part == begin, opposite[3]);
    }
  }
}

template <int rows, bool masked>
void block(const BinaryTask& task, const OutputBlock<kColumns>& outputs, int64_t row, const uint32_t* tile) {
  alignas(16) int32_t opposite[rows][kColumns] = {};
  float sums[rows][kColumns] = {};
  const auto convert = [](const float* value, auto* out) {
    for (int i = 0; i < kColumns; i += 4) store4(out + i, vld1q_f32(value + i));
  };
  for (int64_t group = 0; group < task.groups; ++group) {
    count<rows, masked>(task, row, tile, group * task.group_words, task.group_end(group), opposite);
    for (int i = 0; i < rows; ++i)
      finish_row(task, outputs, row + i, group, opposite[i], sums[i], convert, inside_range);
  }
}

template <int rows>
void block(const BinaryTask& task, const OutputBlock<kColumns>& outputs, int64_t row, const uint32_t* tile) {
  bool masked = task.p.operand != Operand::sign;
  if (task.p.operand == Operand::ternary) {  // rows without a zero are plain signs
    int64_t present = 0;
    for (int64_t i = row * task.groups; i < (row + rows) * task.groups; ++i) present += task.present[i];
    masked = present != rows * task.p.k;
  }
  masked ? block<rows, true>(task, outputs, row, tile) : block<rows, false>(task, outputs, row, tile);
}

}  // namespace

void binary_matmul_tiles_neon(const BinaryMatmulParams& p, int64_t begin, int64_t end) {
  if (p.k == 0) return binary_matmul_tiles_generic(p, begin, end);
  const BinaryTask task(p);
  OutputBlock<kColumns> outputs;
  const Scratch<float> scale(task.groups * kColumns);
  outputs.scale = scale;
  for (int64_t tile = begin; tile < end; ++tile) {
    load_block(task, tile, end, outputs);
    const uint32_t* weight = reinterpret_cast<const uint32_t*>(p.weight + tile * task.words * kTileRows);
    int64_t row = 0;
    for (; row + 4 <= p.m; row += 4) block<4>(task, outputs, row, weight);
    for (; row < p.m; ++row) block<1>(task, outputs, row, weight);
  }
}

}  // namespace bitmill::detail
