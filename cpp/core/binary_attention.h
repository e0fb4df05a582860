// SPDX-License-Identifier: Apache-2.0
// Attention whose queries, keys, values and map are bits: signs of floats (or packed rows) come in, products of
// integers go out, as floats (or as the packed rows of the next layer). With S = sgn(q) sgn(k)^T scaled, a bias and
// dropped keys from the mask, and A the {0, 1} map that a rule makes of S, the context is step * (A sgn(v)), where A
// sgn(v) is a whole number. Scores never reach memory beyond one block of rows.
#pragma once

#include <cstdint>

#include "binary_matmul.h"
#include "floats.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

enum class AttentionRule {
  bool_,          // [S > 0]
  softmax_aware,  // [S >= max S - gap], a row's maximum
  elastic         // [softmax(S) > threshold], of a row
};

// An additive mask drops a key from here down.
inline constexpr float kDropped = -1e4f;

// No learned step counts as less.
inline constexpr float kAttentionStepFloor = 1e-5f;

// Matrices whose elements may lie anywhere; all distances are in elements.
struct Matrices {
  const void* data = nullptr;
  const int64_t* offset = nullptr;  // one a matrix
  int64_t row_stride = 0, column_stride = 1;
};

struct AttentionMask {
  Matrices values;      // [rows, m] each
  int64_t count = 0;    // of matrices; 0: no mask
  int64_t rows = 1;     // 1 (the same for every query) or n
  bool boolean = true;  // one byte, not 0: attend; else floats of `dtype`, added to the scores
  Dtype dtype = Dtype::f32;
  const int64_t* of = nullptr;  // [batch]: which of the matrices
};

// Packed rows, the heads side by side.
struct AttentionRows {
  int64_t stride = 0;                // from one row to the next
  const int32_t* sign = nullptr;     // [rows, heads * d / 32], of values [rows, heads * e / 32]
  const int32_t* nonzero = nullptr;  // the same, or null: nothing is 0
};

// Operands and results that are packed already; d and e are multiples of 32, `zeros` and `step` have no say.
struct AttentionBits {
  int64_t heads = 0;  // 0: floats are
  AttentionRows q, k, v;
  const int64_t *q_first = nullptr, *k_first = nullptr;  // [batch / heads + 1]: where each sequence's rows begin
  BitOutput out;                                         // of heads * e columns
};

struct BinaryAttentionParams {
  int64_t batch = 0, n = 0, m = 0, d = 0, e = 0;  // n and m: of the longest sequence, where lengths differ
  AttentionBits bits;
  Matrices q, k, v;  // [n, d], [m, d], [m, e] each
  Dtype dtype = Dtype::f32;
  bool zeros = true;  // sgn(0) = sgn(NaN) = 0; else +1 where x >= 0 and else -1
  AttentionMask mask;

  AttentionRule rule = AttentionRule::bool_;
  float scale = 1.0f;    // S = fl(dot * scale), or
  bool divide = false;   // S = fl(dot / scale); positive and finite
  float gap = 0.0f;      // of softmax_aware: ln(1 / beta)
  double slope = 1.0;    // of elastic: S = slope * dot, in double
  double threshold = 0;  // of elastic
  float step = 1.0f;     // of the context

  Matrices value_addend;     // float32 [m] a matrix of the batch (rows of one column), or null: see below
  float addend_step = 1.0f;  // the context gains fl(addend_step * (A value_addend)), the same for every channel

  void* out = nullptr;  // [n, e] each, of `dtype`
  const int64_t* out_offset = nullptr;
  int64_t out_row_stride = 0;
  ParallelFor parallel_for = serial_for;
};
Status binary_attention(const BinaryAttentionParams& params);

}  // namespace bitmill
