// SPDX-License-Identifier: Apache-2.0
// int8 activations times FP4 weights whose 16 values are integers: vpermb decodes 64 codes to unsigned bytes, value
// plus an offset, vpdpbusd multiplies them with 4 columns of activations. A sum begins with what the offset adds to it,
// negated. Sums are exact modulo 2^32, so only their end must be within int32.
#include <bit>

#include "fp4_row_avx512vnni.h"
#include "fp4_tiles_avx512.h"

namespace bitmill::detail {
namespace {

// `grouped`: every group of a row has a scale of its own. `words`: Path's kWords.
template <bool grouped, int words>
struct Int8Path {
  using Input = int8_t;
  using Sum = __m512i;
  using Values = __m512i;
  static constexpr int kWords = words;
  static constexpr int kSteps = 2;  // step j takes columns 8 w + j, + 2, + 4, + 6 of word w
  __m512i table;                    // 4 times: vpermb takes 6 bits
  float unit;
  int64_t rows;              // m, and up to 3 more, which a block may count
  const int32_t* first_sum;  // [groups][rows]: side by side for a block
  const float* row_scale;    // the same, if grouped

  // Rows that are missing count as zeros.
  static int64_t fours(int64_t rows) { return rows % 4 == 1 ? rows - 1 : ceil_div(rows, 4) * 4; }

  static __m512 elements(const int8_t* x, int64_t k, int64_t first) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    const int64_t left = k - 4 * first;
    const __mmask64 lanes = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_maskz_loadu_epi8(lanes, x + 4 * first), order));
  }

  __m512i lookup(__m512i codes) const { return _mm512_permutexvar_epi8(codes, table); }
  template <int rows>
  static __m512i next(__m512i codes) {
    return _mm512_srli_epi32(codes, 4);
  }
  Sum start(int64_t row, int64_t group) const { return _mm512_set1_epi32(first_sum[group * rows + row]); }
  // As an integer: Zen 4 takes longer to hand a float that was broadcast to an integer instruction.
  static __m512i broadcast(float element) { return _mm512_set1_epi32(std::bit_cast<int32_t>(element)); }
  static Sum multiply_add(Sum sum, __m512i a, __m512i w) {
    sum = _mm512_dpbusd_epi32(sum, w, a);
    asm volatile("" : "+v"(sum));  // g++ 12 would start with other instructions, and run out of registers
    return sum;
  }

  __m512 fold(__m512 result, __m512 scale, Sum sum, int64_t row, int64_t group) const {
    __m512 total = _mm512_cvtepi32_ps(sum);
    if constexpr (grouped) total = _mm512_mul_ps(_mm512_set1_ps(row_scale[group * rows + row]), total);
    return _mm512_add_ps(result, _mm512_mul_ps(scale, total));
  }

  static void finish(const Fp4Task& task, int64_t row, int64_t column, __mmask16 lanes, __m512 value, __m512 bias) {
    const Fp4MatmulParams& p = task.p;
    if constexpr (!grouped) value = _mm512_mul_ps(value, _mm512_set1_ps(p.row_scale[row]));
    value = _mm512_add_ps(value, bias);
    with_dtype(p.dtype, p.out, [&](auto* out) { store16(out + row * p.weight.n + column, lanes, value); });
  }
};

// One row, of weights with one scale a row or a scale byte a group.
template <bool grouped, int words>
void multiply_one_row(const Fp4MatmulParams& p, const Int8Path<grouped, words>& path, int64_t begin, int64_t end) {
  const Fp4Weight& w = p.weight;
  const int64_t k = w.k, all = word_count(k, 4);
  Scratch<float> packed(ceil_div(2 * all, 16) * 16);
  pack<Int8Path<grouped, words>, 1>(path, static_cast<const int8_t*>(p.x), k, packed, 1);
  const Int8Row row{path.table, reinterpret_cast<const int32_t*>(packed.get()), path.first_sum, path.row_scale};
  const int64_t group_words = words > 0 ? words : all;
  const Fp4Task task{p, all, all / group_words, group_words, end, begin, nullptr};
  const auto store = [&](int64_t tile, __m512 sum) {
    alignas(64) float result[kTileRows];
    _mm512_store_ps(result, sum);
    finish_rows(task, path, 0, 1, tile, 1, result);
  };
  if constexpr (words == 0) {
    multiply_whole_row(w, row, path.unit, begin, end, store);
  } else if (w.global_scale) {
    multiply_row<words, grouped>(w, row, E4m3Scales(path.unit, *w.global_scale), begin, end, store);
  } else {
    multiply_row<words, grouped>(w, row, E8m0Scales(path.unit), begin, end, store);
  }
}

// Sum of a row of n values.
int32_t sum_of(const int8_t* x, int64_t n) {
  if (n % 16 == 0 && n <= 64) {  // a group: fewer lanes to add
    __m128i sum = _mm_setzero_si128();
    for (int64_t i = 0; i < n; i += 16) {
      sum = _mm_dpbusd_epi32(sum, _mm_set1_epi8(1), _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    }
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
  }
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 lanes = n - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (n - i)) - 1;
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(lanes, x + i));
  }
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace

void fp4_int8_matmul_tiles_avx512vnni(const Fp4MatmulParams& p, const Fp4Integers& integers, int64_t begin,
                                      int64_t end) {
  const int64_t k = p.weight.k, width = p.weight.group_size > 0 ? p.weight.group_size : k, groups = ceil_div(k, width);
  int offset = 0;
  for (const int8_t value : integers.value) offset = -value > offset ? -value : offset;
  const auto* x = static_cast<const int8_t*>(p.x);
  const int64_t rows = p.m == 1 ? 1 : p.m + 3;
  const Scratch<int32_t> first_sum(rows * groups, 0);
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t last = (group + 1) * width < k ? (group + 1) * width : k;
      first_sum[group * rows + row] = -offset * sum_of(x + row * k + group * width, last - group * width);
    }
  }
  alignas(16) uint8_t table[16];
  for (int i = 0; i < 16; ++i) table[i] = static_cast<uint8_t>(integers.value[i] + offset);
  const __m512i values = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  const Scratch<float> scales(p.grouped_rows ? rows * (groups + 1) : 0, 0);
  float* const row_scale = p.grouped_rows ? scales + rows : nullptr;  // after a group of zeros
  for (int64_t i = 0; p.grouped_rows && i < p.m * groups; ++i) {
    row_scale[i % groups * rows + i / groups] = p.row_scale[i];
  }
  const auto multiply = [&]<bool grouped, int words>() {
    const Int8Path<grouped, words> path{values, integers.unit, rows, first_sum, row_scale};
    const bool whole = words == 0 && p.weight.scale && groups == 1 && !grouped;
    const bool bytes = words > 0 && p.weight.scale_bytes && k % width == 0 && groups % 4 == 0 && groups >= 16;
    if (p.m == 1 && (whole || bytes)) return multiply_one_row(p, path, begin, end);
    multiply_tiles(p, path, begin, end);
  };
  const auto multiply_groups = [&]<bool grouped>() {
    if (width == kMxBlock) return multiply.template operator()<grouped, 4>();
    if (width == 16) return multiply.template operator()<grouped, 2>();
    multiply.template operator()<grouped, 0>();
  };
  p.grouped_rows ? multiply_groups.template operator()<true>() : multiply_groups.template operator()<false>();
}

}  // namespace bitmill::detail
