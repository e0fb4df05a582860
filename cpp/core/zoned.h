// SPDX-License-Identifier: Apache-2.0
// The zoned weight of BiLLM and ARB-LLM: in every block of columns some are salient, which all rows share; every other
// weight lies in the concentrated or the sparse zone of its row and block. Its product with float activations, and its
// dense form.
//   w[r, c] = v[c] (mu_z + alpha_z b1)                    a column that is not salient, z = concentrated or sparse
//   w[r, c] = v[c] ((mu_z + alpha_z b1) + beta_z b2)      a salient one; z = salient, or its concentrated or sparse
//   part
// b1, b2 = -1, +1. Zones are not looked up weight by weight: with t = -1, +1 for concentrated and sparse the sums over
// the two zones are half the difference and half the sum of sum b1 x and sum (t b1) x, which are sums of +-x.
#pragma once

#include <cstdint>
#include <vector>

#include "floats.h"
#include "parallel.h"
#include "status.h"

namespace bitmill {

// Planes hold the columns of a block in another order than the layer (layout.h): the salient ones first.
struct ZonedWeight {
  const int32_t* sign = nullptr;          // tiles: b1
  const int32_t* zone = nullptr;          // tiles: sparse (1) or concentrated (0); of a salient column b2
  bool split = false;                     // whether salient columns are split into two zones too:
  const int32_t* salient_zone = nullptr;  // tiles of salient_zone_words words
  int64_t salient_zone_words = 0;
  const int32_t* salient = nullptr;    // [word_count(k)]: which columns of the layer are salient
  const void* scale = nullptr;         // [tiles, blocks, scales, 16] of `scale_dtype`
  const void* column_scale = nullptr;  // [k] of `scale_dtype`, in the layer's order, or null: 1
  Dtype scale_dtype = Dtype::f16;      // f16 or f32
  bool centred = true;                 // whether there is a mu
  int64_t n = 0, k = 0, block = 128;   // a multiple of 32 columns

  // Zone after zone (concentrated, sparse, salient or its two parts): mu if there is one, alpha, beta if salient.
  constexpr int64_t zones() const { return split ? 4 : 3; }
  [[gnu::always_inline]] constexpr int64_t scales() const { return zones() * (centred ? 2 : 1) + zones() - 2; }
};

struct ZonedMatmulParams {
  ZonedWeight weight;
  const void* x = nullptr;  // [m, k], contiguous
  Dtype dtype = Dtype::f32;
  int64_t m = 0;
  const float* bias = nullptr;  // [n] or null
  void* out = nullptr;          // [m, n] of `dtype`
  ParallelFor parallel_for = serial_for;
};
// Status::corrupt if the width of salient_zone is not what the salient columns need.
Status zoned_matmul(const ZonedMatmulParams& params);

// The dense weight, float32 [n, k], in the layer's order of columns.
Status zoned_dequantize(const ZonedWeight& weight, float* dense, ParallelFor parallel_for);

namespace detail {

// A block in the order in which it is stored. Its two parts are read by octets of columns; where one octet holds the
// end of the first part and the beginning of the second it is read twice, with zeros for the other part's activations.
struct ZonedBlock {
  int64_t first, columns, salient;  // columns: of the block; salient: how many of them are
  int64_t split_first;              // where its columns of salient_zone begin

  int64_t salient_octets() const { return ceil_div(salient, 8); }
  int64_t others_begin() const { return salient / 8; }
  int64_t other_octets() const { return columns > salient ? ceil_div(columns, 8) - salient / 8 : 0; }
};

struct ZonedPlan {
  std::vector<ZonedBlock> blocks;
  std::vector<int32_t> order;  // [k]: the layer's column at every stored place
  std::vector<int32_t> slots;  // the same octet by octet as they are read; k where the activation is 0
  int64_t salient_zone_columns = 0;
};
ZonedPlan zoned_plan(const ZonedWeight& weight);

void zoned_tiles_avx2(const ZonedMatmulParams& params, const ZonedPlan& plan, int64_t begin, int64_t end);
void zoned_tiles_avx512(const ZonedMatmulParams& params, const ZonedPlan& plan, int64_t begin, int64_t end);

}  // namespace detail
}  // namespace bitmill
