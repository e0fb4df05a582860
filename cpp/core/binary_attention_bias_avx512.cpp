// SPDX-License-Identifier: Apache-2.0
// The decision of one row of binary attention whose scores have a bias, 16 keys at a time (the elastic rule: 8).
// Bit-equal to `decide`: the two rules in float32 take the same steps. The elastic rule compares weights in float32
// first, in float64 where those are too near its limit, and asks `decide` where a unit of the exact weights could
// matter.
#include <cmath>
#include <limits>
#include <memory>

#include "avx512.h"
#include "binary_attention_task.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

template <class T>
struct BiasedRow {
  const AttentionTask& t;
  const T* bias;
  const int32_t* dot;  // [32 map_words]
  const uint32_t* keep;

  int64_t steps() const { return 2 * t.map_words; }
  __mmask16 attended(int64_t step) const { return static_cast<__mmask16>(keep[step / 2] >> (step % 2 * 16)); }
  __m512 biases(int64_t step) const { return load16(bias + step * kTileRows, first_lanes(t.p.m - step * kTileRows)); }

  __m512 score(int64_t step) const {
    const __m512 dots = _mm512_cvtepi32_ps(_mm512_loadu_si512(dot + step * kTileRows));
    const __m512 scale = _mm512_set1_ps(t.p.scale);
    return _mm512_add_ps(t.p.divide ? _mm512_div_ps(dots, scale) : _mm512_mul_ps(dots, scale), biases(step));
  }

  // A score of the elastic rule.
  __m512d wide(__m256i dots, __m256 some) const {
    return _mm512_add_pd(_mm512_mul_pd(_mm512_set1_pd(t.p.slope), _mm512_cvtepi32_pd(dots)), _mm512_cvtps_pd(some));
  }
};

// Bits [map_words] from active(step); answers how many are set.
template <class Active>
[[gnu::always_inline]] inline int32_t write_halves(const AttentionTask& t, uint32_t* bits, const Active& active) {
  int32_t count = 0;
  for (int64_t w = 0; w < t.map_words; ++w) {
    const __mmask16 low = active(2 * w), high = active(2 * w + 1);
    bits[w] = _cvtmask32_u32(_mm512_kunpackw(high, low));
    count += _mm_popcnt_u32(bits[w]);
  }
  return count;
}

template <class T>
int32_t decide_bool(const BiasedRow<T>& row, uint32_t* bits) {
  return write_halves(row.t, bits, [&](int64_t step) {
    return _mm512_mask_cmp_ps_mask(row.attended(step), row.score(step), _mm512_setzero_ps(), _CMP_GT_OQ);
  });
}

template <class T>
int32_t decide_softmax_aware(const BiasedRow<T>& row, uint32_t* bits) {
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 top = none;
  __mmask16 unordered = 0;
  for (int64_t step = 0; step < row.steps(); ++step) {
    const __mmask16 attended = row.attended(step);
    const __m512 score = row.score(step);
    unordered |= _mm512_mask_cmp_ps_mask(attended, score, score, _CMP_UNORD_Q);
    top = _mm512_mask_max_ps(top, attended, top, score);
  }
  const float largest = unordered ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(top);
  const __m512 limit = _mm512_set1_ps(largest - row.t.p.gap);
  return write_halves(row.t, bits, [&](int64_t step) {
    const __m512 score = row.score(step);
    const __mmask16 above = _mm512_mask_cmp_ps_mask(row.attended(step), score, none, _CMP_GT_OQ);
    return _mm512_mask_cmp_ps_mask(above, score, limit, _CMP_GE_OQ);
  });
}

// 2^38 exp(x) for x <= 0, within 0.1; a NaN stays. What is below exp(-64) counts as that, which is 0 to the rounding.
__m512d weight_of(__m512d x) {
  const __m512d least = _mm512_set1_pd(-64.0);
  x = _mm512_max_pd(least, x);  // of a NaN and a number the second
  const __m512d n = _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(0x1.71547652b82fep+0)), 8);
  __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.62e42fefa39efp-1), x);
  r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.abc9e3b39803fp-56), r);
  __m512d y = _mm512_set1_pd(1.0 / 3628800);  // Taylor's polynomial of degree 10, |r| <= ln(2) / 2
  for (const double c :
       {1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0}) {
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(c));
  }
  return _mm512_scalef_pd(y, _mm512_add_pd(n, _mm512_set1_pd(38.0)));
}

// Answers -1 where a decision is too near to be sure of.
template <class T>
int32_t decide_elastic(const BiasedRow<T>& row, uint32_t* bits, double* weight) {
  __m512d top_low = _mm512_set1_pd(-std::numeric_limits<double>::infinity()), top_high = top_low;
  for (int64_t step = 0; step < row.steps(); ++step) {
    const __mmask16 attended = row.attended(step);
    const __m512i dots = _mm512_loadu_si512(row.dot + step * kTileRows);
    const __m512 bias = row.biases(step);
    const __m512d low = row.wide(_mm512_castsi512_si256(dots), _mm512_castps512_ps256(bias));
    const __m512d high = row.wide(_mm512_extracti64x4_epi64(dots, 1), _mm512_extractf32x8_ps(bias, 1));
    top_low = _mm512_mask_max_pd(top_low, static_cast<__mmask8>(attended), top_low, low);
    top_high = _mm512_mask_max_pd(top_high, static_cast<__mmask8>(attended >> 8), top_high, high);
    _mm512_storeu_pd(weight + step * kTileRows, low);
    _mm512_storeu_pd(weight + step * kTileRows + kTileRows / 2, high);
  }
  const __m512d largest = _mm512_set1_pd(_mm512_reduce_max_pd(_mm512_max_pd(top_low, top_high)));
  __m512d sum_low = _mm512_setzero_pd(), sum_high = sum_low;
  for (int64_t step = 0; step < row.steps(); ++step) {
    const __mmask16 attended = row.attended(step);
    double* at = weight + step * kTileRows;
    const __m512d low = weight_of(_mm512_sub_pd(_mm512_loadu_pd(at), largest));
    const __m512d high = weight_of(_mm512_sub_pd(_mm512_loadu_pd(at + kTileRows / 2), largest));
    sum_low = _mm512_mask_add_pd(sum_low, static_cast<__mmask8>(attended), sum_low, low);
    sum_high = _mm512_mask_add_pd(sum_high, static_cast<__mmask8>(attended >> 8), sum_high, high);
    _mm512_storeu_pd(at, low);
    _mm512_storeu_pd(at + kTileRows / 2, high);
  }
  const double limit = row.t.p.threshold * _mm512_reduce_add_pd(_mm512_add_pd(sum_low, sum_high));
  const double unsure = 2.0 + 2.0 * row.t.p.threshold * static_cast<double>(row.t.p.m);
  const __m512d high = _mm512_set1_pd(limit + unsure), low = _mm512_set1_pd(limit - unsure);
  bool sure = true;
  const auto compare = [&](const double* w, __mmask8 attended) {
    const __m512d x = _mm512_loadu_pd(w);
    const __mmask8 above = _mm512_mask_cmp_pd_mask(attended, x, high, _CMP_GT_OQ);
    sure &= (above | _mm512_mask_cmp_pd_mask(attended, x, low, _CMP_LT_OQ)) == attended;
    return above;
  };
  const int32_t count = write_halves(row.t, bits, [&](int64_t step) {
    const __mmask16 attended = row.attended(step);
    const double* w = weight + step * kTileRows;
    const __mmask8 first = compare(w, static_cast<__mmask8>(attended));
    const __mmask8 second = compare(w + kTileRows / 2, static_cast<__mmask8>(attended >> 8));
    return static_cast<__mmask16>(first | second << 8);
  });
  return sure ? count : -1;
}

// exp(x) for x <= 0, to a relative 2e-7; a NaN stays, and what is below exp(-64) counts as that.
__m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-64.0f), x);  // of a NaN and a number the second
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e430p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-0x1.05c610p-29f), r);
  __m512 y = _mm512_set1_ps(1.0f / 720);  // Taylor's polynomial of degree 6, |r| <= ln(2) / 2
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(y, n);
}

// decide_elastic in float32, 16 keys at a time: -1 where a decision is too near for that, which is rare.
template <class T>
int32_t decide_elastic_roughly(const BiasedRow<T>& row, uint32_t* bits, float* weight) {
  const __m512 slope = _mm512_set1_ps(static_cast<float>(row.t.p.slope));
  __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t step = 0; step < row.steps(); ++step) {
    const __m512 dots = _mm512_cvtepi32_ps(_mm512_loadu_si512(row.dot + step * kTileRows));
    const __m512 score = _mm512_fmadd_ps(slope, dots, row.biases(step));
    top = _mm512_mask_max_ps(top, row.attended(step), top, score);
    _mm512_storeu_ps(weight + step * kTileRows, score);
  }
  const float largest = _mm512_reduce_max_ps(top);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t step = 0; step < row.steps(); ++step) {
    float* at = weight + step * kTileRows;
    const __m512 w = exponential(_mm512_sub_ps(_mm512_loadu_ps(at), _mm512_set1_ps(largest)));
    sums = _mm512_mask_add_ps(sums, row.attended(step), sums, w);
    _mm512_storeu_ps(at, w);
  }
  const float limit = static_cast<float>(row.t.p.threshold) * _mm512_reduce_add_ps(sums);
  // Weights that matter are those of scores within 64 of the largest, and a score is off by its rounding; a sum by that
  // of its additions. All five times what it can be.
  const float unsure = 2e-5f + 2e-6f * (std::fabs(largest) + 64.0f) + 1e-7f * static_cast<float>(row.t.p.m);
  const __m512 high = _mm512_set1_ps(limit * (1 + unsure)), low = _mm512_set1_ps(limit * (1 - unsure));
  bool sure = true;
  const int32_t count = write_halves(row.t, bits, [&](int64_t step) {
    const __mmask16 attended = row.attended(step);
    const __m512 w = _mm512_loadu_ps(weight + step * kTileRows);
    const __mmask16 above = _mm512_mask_cmp_ps_mask(attended, w, high, _CMP_GT_OQ);
    sure &= (above | _mm512_mask_cmp_ps_mask(attended, w, low, _CMP_LT_OQ)) == attended;
    return above;
  });
  return sure ? count : -1;
}

}  // namespace

int32_t decide_biased_avx512(const AttentionTask& t, int64_t batch, int64_t row, const int32_t* dot, uint32_t* bits,
                             double* weight) {
  const Matrices& mask = t.p.mask.values;
  if (mask.column_stride != 1) return decide(t, batch, row, dot, bits);
  const int32_t count = with_dtype(t.p.mask.dtype, mask.data, [&]<class T>(const T* data) {
    const T* bias = data + mask.offset[t.p.mask.of[batch]] + (t.p.mask.rows > 1 ? row * mask.row_stride : 0);
    const BiasedRow<T> biased{t, bias, dot, t.keep_of(batch, row)};
    if (t.p.rule == AttentionRule::bool_) return decide_bool(biased, bits);
    if (t.p.rule == AttentionRule::softmax_aware) return decide_softmax_aware(biased, bits);
    const int32_t count = decide_elastic_roughly(biased, bits, reinterpret_cast<float*>(weight));
    return count < 0 ? decide_elastic(biased, bits, weight) : count;
  });
  return count < 0 ? decide(t, batch, row, dot, bits) : count;
}

}  // namespace bitmill::detail
