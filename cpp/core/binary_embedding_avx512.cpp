// SPDX-License-Identifier: Apache-2.0
// Rows of a table of bits with AVX-512: a word is the mask between two vectors. Bit-equal to the generic form.
#include "avx512.h"
#include "binary_embedding_rows.h"

namespace bitmill::detail {
namespace {

void write_floats(float* out, uint32_t signs, uint32_t nonzeros, float scale, int64_t columns) {
  const __m512 positive = _mm512_set1_ps(scale), negative = _mm512_set1_ps(-scale), zero = _mm512_set1_ps(scale * 0.0f);
  const auto values = [&](int first) {
    const __m512 value = _mm512_mask_blend_ps(static_cast<__mmask16>(signs >> first), negative, positive);
    return _mm512_mask_blend_ps(static_cast<__mmask16>(nonzeros >> first), zero, value);
  };
  if (columns == 32) {
    _mm512_storeu_ps(out, values(0));
    _mm512_storeu_ps(out + 16, values(16));
    return;
  }
  _mm512_mask_storeu_ps(out, first_lanes(columns), values(0));
  _mm512_mask_storeu_ps(out + 16, first_lanes(columns - 16), values(16));
}

template <class T>
void write_halves(T* out, uint32_t signs, uint32_t nonzeros, T scale, int64_t columns) {
  T levels[3];  // of -1, 0, +1
  for (int i = 0; i < 3; ++i) store(to_float(scale) * static_cast<float>(i - 1), levels + i);
  const auto all = [&](int i) { return _mm512_set1_epi16(static_cast<int16_t>(levels[i].bits)); };
  const __m512i values = _mm512_mask_blend_epi16(nonzeros, all(1), _mm512_mask_blend_epi16(signs, all(0), all(2)));
  if (columns == 32) return _mm512_storeu_si512(out, values);
  _mm512_mask_storeu_epi16(out, (1u << columns) - 1, values);
}

}  // namespace

void binary_embedding_rows_avx512(const BinaryEmbeddingParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::f32:
      return for_each_word<float>(p, begin, end, write_floats);
    case Dtype::bf16:
      return for_each_word<BFloat16>(p, begin, end, write_halves<BFloat16>);
    case Dtype::f16:
      return for_each_word<Float16>(p, begin, end, write_halves<Float16>);
  }
}

}  // namespace bitmill::detail
