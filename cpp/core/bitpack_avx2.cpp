// SPDX-License-Identifier: Apache-2.0
// Packing rows of floats with AVX2: 32 values become one word by four compares and movmasks. Bit-equal to the generic
// form.
#include <cstring>

#include "avx2.h"
#include "bitpack.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

struct Word {
  uint32_t sign = 0, nonzero = 0;
};

template <int predicate>
uint32_t compare(__m256 z, __m256 bound) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(z, bound, predicate)));
}

// 32 values, all readable. `shift` and `magnitudes` may be null.
template <Levels levels, class T>
Word pack_word(const T* x, const float* shift, float threshold, float* magnitudes) {
  Word word;
  const __m256 zero = _mm256_setzero_ps(), bound = _mm256_set1_ps(threshold);
  for (int i = 0; i < 32; i += 8) {
    __m256 z = load8(x + i);
    if (shift) z = _mm256_add_ps(z, _mm256_loadu_ps(shift + i));
    if (magnitudes) _mm256_storeu_ps(magnitudes + i, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), z));
    if constexpr (levels == Levels::sign) {
      word.sign |= compare<_CMP_GT_OQ>(z, zero) << i;
      word.nonzero |= compare<_CMP_NEQ_OQ>(z, zero) << i;
    } else if constexpr (levels == Levels::plus) {
      word.sign |= compare<_CMP_GE_OQ>(z, zero) << i;
    } else {
      word.sign |= compare<_CMP_GT_OQ>(z, bound) << i;
    }
  }
  return word;
}

template <Levels levels, class T>
void pack_rows(const BitpackParams& p, const T* x, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k), whole = p.k / 32, left = p.k % 32;
  // 32 more than mean_by_halves needs: the last word is written whole
  float* magnitudes = p.mean ? new float[2 * static_cast<size_t>(p.k) + 32] : nullptr;
  float last_shift[32] = {};
  if (p.shift && left > 0) std::memcpy(last_shift, p.shift + 32 * whole, static_cast<size_t>(left) * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    int64_t count = 0;
    const auto put = [&](int64_t w, Word word) {
      p.sign[row * words + w] = static_cast<int32_t>(word.sign);
      if constexpr (levels == Levels::sign) p.nonzero[row * words + w] = static_cast<int32_t>(word.nonzero);
      count += _mm_popcnt_u32(levels == Levels::sign ? word.nonzero : word.sign);
    };
    for (int64_t w = 0; w < whole; ++w) {
      const float* shift = p.shift ? p.shift + 32 * w : nullptr;
      put(w, pack_word<levels>(input + 32 * w, shift, p.threshold, magnitudes ? magnitudes + 32 * w : nullptr));
    }
    if (left > 0) {  // 1 to 31 columns are left: a padded copy, and no bits past k
      T last[32] = {};
      std::memcpy(last, input + 32 * whole, static_cast<size_t>(left) * sizeof(T));
      Word word = pack_word<levels>(last, last_shift, p.threshold, magnitudes ? magnitudes + 32 * whole : nullptr);
      const uint32_t columns = (1u << left) - 1;
      put(whole, {word.sign & columns, word.nonzero & columns});
    }
    if (p.count) p.count[row] = static_cast<int32_t>(count);
    if (magnitudes) p.mean[row] = mean_by_halves(magnitudes, p.k);
  }
  delete[] magnitudes;
}

}  // namespace

void bitpack_rows_avx2(const BitpackParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    switch (p.levels) {
      case Levels::sign:
        return pack_rows<Levels::sign>(p, x, begin, end);
      case Levels::plus:
        return pack_rows<Levels::plus>(p, x, begin, end);
      case Levels::bool_:
        return pack_rows<Levels::bool_>(p, x, begin, end);
    }
  });
}

}  // namespace bitmill::detail
