// SPDX-License-Identifier: Apache-2.0
// Rows of a table of bits with AVX2: bits are moved to the top of the lanes that they choose for. Bit-equal to the
// generic form.
#include <cstring>

#include "avx2.h"
#include "binary_embedding_rows.h"

namespace bitmill::detail {
namespace {

// What -1, 0 and +1 become.
template <class T>
struct Values {
  T negative, zero, positive;

  explicit Values(T scale) {
    store(to_float(scale) * -1.0f, &negative);
    store(to_float(scale) * 0.0f, &zero);
    store(to_float(scale), &positive);
  }
};

void write_word(float* out, uint32_t signs, uint32_t nonzeros, float scale) {
  const Values<float> values(scale);
  const __m256i to_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  for (int i = 0; i < 32; i += 8) {
    const auto mask = [&](uint32_t bits) {
      return _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(bits >> i)), to_top));
    };
    const __m256 sign = _mm256_blendv_ps(_mm256_set1_ps(values.negative), _mm256_set1_ps(values.positive), mask(signs));
    _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_set1_ps(values.zero), sign, mask(nonzeros)));
  }
}

template <class T>  // of 16 bits
void write_word(T* out, uint32_t signs, uint32_t nonzeros, T scale) {
  const Values<T> values(scale);
  const auto all = [](T x) { return _mm256_set1_epi16(static_cast<int16_t>(x.bits)); };
  const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  for (int i = 0; i < 32; i += 16) {
    const auto mask = [&](uint32_t bits) {
      const __m256i word = _mm256_set1_epi16(static_cast<int16_t>(bits >> i));
      return _mm256_cmpeq_epi16(_mm256_and_si256(word, bit), bit);
    };
    const __m256i sign = _mm256_blendv_epi8(all(values.negative), all(values.positive), mask(signs));
    store_bits(out + i, _mm256_blendv_epi8(all(values.zero), sign, mask(nonzeros)));
  }
}

}  // namespace

void binary_embedding_rows_avx2(const BinaryEmbeddingParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.out, [&]<class T>(T*) {
    for_each_word<T>(p, begin, end, [](T* out, uint32_t signs, uint32_t nonzeros, T scale, int64_t columns) {
      if (columns == 32) return write_word(out, signs, nonzeros, scale);
      T last[32];
      write_word(last, signs, nonzeros, scale);
      std::memcpy(out, last, static_cast<size_t>(columns) * sizeof(T));
    });
  });
}

}  // namespace bitmill::detail
