// SPDX-License-Identifier: Apache-2.0
// The bits that binary attention multiplies, in scratch memory, and the kernels' view of a call.
#pragma once

#include "binary_attention_task.h"
#include "device.cuh"
#include "launchers.h"

namespace bitmill::cuda {

inline constexpr int64_t kChannels = 64;  // of a block; values are padded to a multiple

// Offsets that lie at two even distances, as those of [b, h, ...] do: (i / inner) outer_step + (i % inner) inner_step.
struct Places {
  int64_t inner = 1, outer_step = 0, inner_step = 0;
  __host__ __device__ int64_t at(int64_t i) const { return i / inner * outer_step + i % inner * inner_step; }
};

// The numbers of the elastic rule.
struct AttentionNumbers {
  double slope, threshold;
  float step, addend_step;
};

// The planes of nonzero bits are there if one operand needs any; without, values have no minus plane.
struct AttentionView {
  BinaryAttentionParams p;
  int64_t words, map_words;  // of d and of m
  bool zeros;
  const uint32_t *q_sign, *q_nonzero;  // [batch, n, words]
  const uint32_t *k_sign, *k_nonzero;  // [batch, words, 32 map_words]
  const uint32_t *v_plus, *v_minus;    // [batch, map_words, channels]
  const uint32_t* keep;                // [masks, mask rows, map_words], or null without a mask
  const int32_t* biased;               // whether the mask has floats that neither drop a key nor are 0
  Places mask, bias, out, addend;
  const AttentionNumbers* numbers;  // made of learned steps, or null: those of the params

  __host__ __device__ int64_t keys() const { return 32 * map_words; }
  __host__ __device__ int64_t channels() const { return ceil_div(p.e, kChannels) * kChannels; }
};

// Packs the operands and the mask of checked params into scratch memory. bad_argument: a place that Places has not.
Status pack_attention(const BinaryAttentionParams& params, const AttentionSteps& steps, int32_t* scratch, Stream stream,
                      AttentionView& view);

}  // namespace bitmill::cuda
