// SPDX-License-Identifier: Apache-2.0
// What the AVX-512 forms of the int8 x bits product share: from integer sums to the result.
#pragma once

#include "avx512.h"
#include "binary_int8_matmul.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill::detail {

struct Int8Task {
  const BinaryInt8MatmulParams& p;
  int64_t words, groups, group_words;
  int64_t end;           // the first tile that belongs to somebody else
  const int32_t* total;  // [m, groups]: the sum of q over the columns of the group

  int64_t group_end(int64_t group) const {
    const int64_t last = (group + 1) * group_words;
    return last < words ? last : words;
  }
  const int32_t* tile(int64_t t) const { return p.weight + (t < end ? t : end - 1) * words * kTileRows; }
};

static inline Int8Task make_int8_task(const BinaryInt8MatmulParams& p, int64_t end, int32_t* total) {
  const int64_t words = word_count(p.k), group_words = p.group_size > 0 ? p.group_size / 32 : words;
  const Int8Task task{p, words, ceil_div(words, group_words), group_words, end, total};
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t group = 0; group < task.groups; ++group) {
      const int64_t to = 32 * task.group_end(group) < p.k ? 32 * task.group_end(group) : p.k;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = 32 * group * group_words; i < to; i += 16) {
        sum =
            _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(to - i), p.q + row * p.k + i)));
      }
      total[row * task.groups + group] = _mm512_reduce_add_epi32(sum);
    }
  }
  return task;
}

// `plus`: for 16 outputs the sums of q over the set bits of the group.
static inline __m512 to_dot(const Int8Task& task, int64_t row, int64_t group, __m512i plus) {
  const __m512i total = _mm512_set1_epi32(task.total[row * task.groups + group]);
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(plus, plus), total));
}

// Any tile, any dtype, any number of groups: `partial` carries a float from group to group.
static inline void finish(const Int8Task& task, int64_t row, int64_t tile, int64_t group, __m512i plus,
                          float* partial) {
  if (tile >= task.end) return;
  const BinaryInt8MatmulParams& p = task.p;
  const int64_t column = tile * kTileRows;
  const __mmask16 lanes = first_lanes(p.n - column);
  const __m512 factor =
      _mm512_mul_ps(load_scale(p.scale, task.groups, column, group, lanes), _mm512_set1_ps(p.row_scale[row]));
  __m512 value = _mm512_mul_ps(factor, to_dot(task, row, group, plus));
  if (group > 0) value = _mm512_add_ps(_mm512_loadu_ps(partial), value);
  if (group + 1 < task.groups) return _mm512_storeu_ps(partial, value);
  if (p.addend) value = _mm512_add_ps(value, _mm512_loadu_ps(p.addend.at(row, tile)));
  if (p.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, p.bias + column));
  with_dtype(p.out_dtype, p.out, [&](auto* out) { store16(out + row * p.n + column, lanes, value); });
}

}  // namespace bitmill::detail
