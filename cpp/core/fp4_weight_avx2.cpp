// SPDX-License-Identifier: Apache-2.0
// FP4 weights as floats with AVX2, bit-equal to the generic form.
#include "fp4_lookup_avx2.h"
#include "fp4_scales_avx2.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

// 8 columns of up to 8 rows to memory, as rows.
void store_rows(__m256 (&z)[8], int64_t rows, int64_t columns, float* out, int64_t stride) {
  transpose8(z);
  for (int64_t i = 0; i < rows; ++i) {
    if (columns == 8) {
      _mm256_storeu_ps(out + i * stride, z[i]);
    } else {
      std::memcpy(out + i * stride, &z[i], static_cast<size_t>(columns) * sizeof(float));
    }
  }
}

template <int planes>
void weight_tiles(const Fp4Weight& w, float* values, int64_t begin, int64_t end) {
  const Fp4TileLookup<planes> lookup(w.table);
  const int64_t words = word_count(w.k, 4), group_words = w.group_size > 0 ? w.group_size / 8 : words;
  const int64_t groups = ceil_div(words, group_words);
  // The factor of the whole tensor is the last one: scales are bytes alone here, which is what they are times 1.
  const float one = 1.0f, factor = w.global_scale ? *w.global_scale : one;
  Fp4Weight bytes = w;
  if (w.global_scale) bytes.global_scale = &one;
  const Scratch<float> scale(groups * kTileRows);
  for (int64_t tile = begin; tile < end; ++tile) {
    expand_scales(bytes, groups, tile, 1.0f, scale);
    for (int64_t first = tile * kTileRows; first < (tile + 1) * kTileRows && first < w.n; first += 8) {
      const int64_t lane = first % kTileRows, rows = w.n - first < 8 ? w.n - first : 8;
      for (int64_t word = 0; word < words; ++word) {
        const __m256 unit = _mm256_loadu_ps(scale + word / group_words * kTileRows + lane);
        const __m256i pairs = lookup.load(w.tiles + (tile * words + word) * kTileRows + lane);
        __m256 z[8];
        for (int half = 0; half < 2; ++half) {
          __m256 v[4];
          lookup(lookup.half(pairs, half), v);
          for (int i = 0; i < 4; ++i) {
            z[decoded_column(4 * half + i)] = _mm256_mul_ps(_mm256_mul_ps(unit, v[i]), _mm256_set1_ps(factor));
          }
        }
        const int64_t columns = w.k - 8 * word < 8 ? w.k - 8 * word : 8;
        store_rows(z, rows, columns, values + first * w.k + 8 * word, w.k);
      }
    }
  }
}

}  // namespace

void fp4_weight_tiles_avx2(const Fp4Weight& w, float* values, int64_t begin, int64_t end) {
  are_bfloat16(w.table) ? weight_tiles<2>(w, values, begin, end) : weight_tiles<4>(w, values, begin, end);
}

}  // namespace bitmill::detail
