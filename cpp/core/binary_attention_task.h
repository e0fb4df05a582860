// SPDX-License-Identifier: Apache-2.0
// What the instruction sets share of binary attention: the packed operands of one call, and the decision of one row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "binary_attention.h"
#include "layout.h"

namespace bitmill::detail {

// Keys come in pairs of tiles, so that 32 of them are one word of the map.
static inline int64_t key_tiles(int64_t m) { return 2 * word_count(m); }

// A weight of the elastic rule is exp(S - max S) in fixed point, so a sum of them is exact in every order.
inline constexpr double kWeightOne = 274877906944.0;  // 2^38

static inline int64_t elastic_weight(double x) {
  const double weight = std::exp(x) * kWeightOne;
  return weight >= 0 ? static_cast<int64_t>(std::nearbyint(weight)) : 0;  // NaN weighs nothing; x is at most 0
}

struct AttentionTask {
  const BinaryAttentionParams& p;
  int64_t words, map_words;  // of d and of m
  // Tiles of bits: keys [batch][key_tiles(m)][words][16], values transposed [batch][tile_count(e)][map_words][16]. The
  // nonzero planes are null where sgn(0) = +1; `*_zeros` [batch] says whether a plane holds a 0 within its matrix.
  int32_t *k_sign, *k_nonzero, *v_sign, *v_nonzero;
  uint8_t *k_zeros, *v_zeros;
  uint32_t* keep;           // [masks][mask rows][map_words]: keys that a query may attend, 0 past the last
  bool biased;              // the mask holds floats that neither drop a key nor are 0
  int32_t* lowest;          // softmax_aware: [2 d + 1], the smallest active dot where the largest of a row is i - d
  int64_t* weight;          // elastic: [4 d + 3], of a dot that is i below the largest of its row; 0 past 2 d
  int64_t* weight_of_pair;  // elastic: [2 d + 2], every second of them

  // Of one matrix of the batch.
  int64_t sequence(int64_t batch) const { return p.bits.heads ? batch / p.bits.heads : 0; }
  int64_t query_rows(int64_t batch) const { return p.bits.heads ? length(p.bits.q_first, batch) : p.n; }
  int64_t key_rows(int64_t batch) const { return p.bits.heads ? length(p.bits.k_first, batch) : p.m; }
  int64_t length(const int64_t* first, int64_t batch) const {
    return first[sequence(batch) + 1] - first[sequence(batch)];
  }

  const uint32_t* keep_of(int64_t batch, int64_t row) const {
    const int64_t rows = p.mask.count ? p.mask.rows : 1, matrix = p.mask.count ? p.mask.of[batch] : sequence(batch);
    return keep + (matrix * rows + (rows > 1 ? row : 0)) * map_words;
  }
};

static constexpr float attention_score(const BinaryAttentionParams& p, int32_t dot) {
  return p.divide ? static_cast<float>(dot) / p.scale : static_cast<float>(dot) * p.scale;
}

// bits [map_words] of a row from active(j), for attended keys only; answers how many are set.
template <class Active>
static inline int32_t write_bits(const AttentionTask& t, const uint32_t* keep, uint32_t* bits, const Active& active) {
  int32_t count = 0;
  for (int64_t w = 0; w < t.map_words; ++w) {
    uint32_t word = 0;
    for (int64_t j = 32 * w; j < 32 * (w + 1) && j < t.p.m; ++j) word |= static_cast<uint32_t>(active(j)) << (j % 32);
    bits[w] = word & keep[w];
    count += __builtin_popcount(bits[w]);
  }
  return count;
}

static inline bool attends(const uint32_t* keep, int64_t j) { return (keep[j / 32] >> (j % 32)) & 1u; }

// The largest value(j) of the attended keys, or `none` without one. A NaN stays.
template <class T, class Value>
static inline T largest(const AttentionTask& t, const uint32_t* keep, T none, const Value& value) {
  T top = none;
  for (int64_t j = 0; j < t.p.m; ++j) {
    if (attends(keep, j) && !(value(j) <= top) && top == top) top = value(j);
  }
  return top;
}

// The decision of one row from its scores with a bias: floats, or doubles for the elastic rule.
template <class T>
static int32_t decide_biased(const AttentionTask& t, int64_t batch, int64_t row, const int32_t* dot, uint32_t* bits) {
  const BinaryAttentionParams& p = t.p;
  const uint32_t* keep = t.keep_of(batch, row);
  const Matrices& mask = p.mask.values;
  const T* bias = static_cast<const T*>(mask.data) + mask.offset[p.mask.of[batch]];
  bias += p.mask.rows > 1 ? row * mask.row_stride : 0;
  const auto score = [&](int64_t j) { return attention_score(p, dot[j]) + to_float(bias[j * mask.column_stride]); };
  if (p.rule == AttentionRule::bool_) return write_bits(t, keep, bits, [&](int64_t j) { return score(j) > 0.0f; });
  if (p.rule == AttentionRule::softmax_aware) {
    const float none = -std::numeric_limits<float>::infinity(), limit = largest(t, keep, none, score) - p.gap;
    return write_bits(t, keep, bits, [&](int64_t j) { return score(j) >= limit && score(j) > none; });
  }
  const auto wide = [&](int64_t j) {
    return p.slope * static_cast<double>(dot[j]) + static_cast<double>(to_float(bias[j * mask.column_stride]));
  };
  const double top = largest(t, keep, -std::numeric_limits<double>::infinity(), wide);
  const auto weight = [&](int64_t j) { return elastic_weight(wide(j) - top); };
  int64_t sum = 0;
  for (int64_t j = 0; j < p.m; ++j) sum += attends(keep, j) ? weight(j) : 0;
  const double limit = p.threshold * static_cast<double>(sum);
  return write_bits(t, keep, bits, [&](int64_t j) { return static_cast<double>(weight(j)) > limit; });
}

// The decision of one row from its integers. Answers the number of bits set.
static inline int32_t decide(const AttentionTask& t, int64_t batch, int64_t row, const int32_t* dot, uint32_t* bits) {
  const BinaryAttentionParams& p = t.p;
  if (t.biased) {
    return with_dtype(p.mask.dtype, p.mask.values.data,
                      [&]<class T>(const T*) { return decide_biased<T>(t, batch, row, dot, bits); });
  }
  const uint32_t* keep = t.keep_of(batch, row);
  if (p.rule == AttentionRule::bool_) return write_bits(t, keep, bits, [&](int64_t j) { return dot[j] > 0; });
  const int32_t top = largest(t, keep, static_cast<int32_t>(-p.d), [&](int64_t j) { return dot[j]; });
  if (p.rule == AttentionRule::softmax_aware) {
    const int32_t lowest = t.lowest[top + p.d];
    return write_bits(t, keep, bits, [&](int64_t j) { return dot[j] >= lowest; });
  }
  int64_t sum = 0;
  for (int64_t j = 0; j < p.m; ++j) sum += attends(keep, j) ? t.weight[top - dot[j]] : 0;
  const double limit = p.threshold * static_cast<double>(sum);
  // a dropped key may lie above the largest of the others
  return write_bits(t, keep, bits,
                    [&](int64_t j) { return dot[j] <= top && static_cast<double>(t.weight[top - dot[j]]) > limit; });
}

// What value_addend adds to the rows of one matrix of the batch; 0 without.
class ValueAddend {
 public:
  ValueAddend(const BinaryAttentionParams& p, int64_t batch) : m_(p.value_addend.data ? p.m : 0), step_(p.addend_step) {
    if (m_ == 0) return;
    padded_ = 32;
    while (padded_ < m_) padded_ *= 2;
    values_.reset(new float[static_cast<size_t>(2 * padded_)]());
    const float* from = static_cast<const float*>(p.value_addend.data) + p.value_addend.offset[batch];
    for (int64_t j = 0; j < m_; ++j) values_[j] = from[j * p.value_addend.row_stride];
  }

  // Of a row with this map; summed by halves, the upper onto the lower, so that the order is the same everywhere.
  [[gnu::always_inline]] float of(const uint32_t* bits) {
    if (m_ == 0) return 0.0f;
    float* z = values_.get() + padded_;
    for (int64_t w = 0; w < word_count(m_); ++w) {
      const float* values = values_.get() + 32 * w;
      for (int j = 0; j < 32; ++j) z[32 * w + j] = (bits[w] >> j) & 1u ? values[j] : 0.0f;
    }
    std::fill(z + 32 * word_count(m_), z + padded_, 0.0f);
    for (int64_t half = padded_ / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) z[j] += z[j + half];
    }
    return step_ * z[0];
  }

 private:
  int64_t m_, padded_ = 0;
  float step_;
  std::unique_ptr<float[]> values_;  // and as much scratch
};

// Rows [first, last) of one matrix of the batch, at most kRowsTogether.
inline constexpr int64_t kRowsTogether = 64;
void attention_rows_generic(const AttentionTask& task, int64_t batch, int64_t first, int64_t last);
void attention_rows_avx2(const AttentionTask& task, int64_t batch, int64_t first, int64_t last);
void attention_rows_avx512(const AttentionTask& task, int64_t batch, int64_t first, int64_t last);

// `decide` for scores with a bias. Of dots [32 map_words]; `weight` is scratch of as many, of the elastic rule.
int32_t decide_biased_avx512(const AttentionTask& task, int64_t batch, int64_t row, const int32_t* dot, uint32_t* bits,
                             double* weight);

// Bits [tile_count(e)][word_count(longest)][16] from the rows of word_count(e) words of m values; with AVX-512 for
// whole words only.
void attention_transpose_avx2(const int32_t* rows, int64_t stride, int64_t m, int64_t e, int64_t longest,
                              int32_t* tiles);
void attention_transpose_avx512(const int32_t* rows, int64_t stride, int64_t m, int64_t e, int64_t longest,
                                int32_t* tiles);

// Bits [tile_count(e)][word_count(m)][16] of the values [m, e] (rows `stride` elements apart), and of what is not 0 if
// `nonzero` is not null; answers whether one is 0.
bool attention_values_avx512(Dtype dtype, const void* x, int64_t stride, int64_t m, int64_t e, int32_t* sign,
                             int32_t* nonzero);

// The signs of rows of d values (`stride` elements apart), as rows of words or as tiles; answers whether one is 0.
bool attention_signs_avx512(const BinaryAttentionParams& params, const void* x, int64_t stride, int64_t rows,
                            bool tiles, int32_t* out);

// The keys and the values of a matrix of the batch, into the task's tiles.
void pack_keys(const AttentionTask& task, int64_t batch);
void pack_values(const AttentionTask& task, int64_t batch);

// The queries of some rows: bits [rows][words], and whether one of them is 0. `nonzero` is written if that is so, or if
// `always`.
bool pack_queries(const AttentionTask& task, int64_t batch, int64_t first, int64_t last, bool always, int32_t* sign,
                  int32_t* nonzero);

}  // namespace bitmill::detail
