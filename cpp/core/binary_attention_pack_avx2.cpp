// SPDX-License-Identifier: Apache-2.0
// Packing the operands of binary attention with AVX2: 32 keys of 32 channels at a time. A byte of each key makes a
// vector, and its highest bits are a word of a channel.
#include <cstring>

#include "avx2.h"
#include "binary_attention_task.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

// 32 words to 32 columns of bits: column c of them all is word c.
void transpose32(const uint32_t* rows, uint32_t* columns) {
  const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                          0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const auto bytes = [&](const uint32_t* from) {
    return _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), gather);
  };
  const __m256i a = bytes(rows), b = bytes(rows + 8), c = bytes(rows + 16), d = bytes(rows + 24);
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  const auto put = [&](int byte, __m256i x) {
    x = _mm256_permutevar8x32_epi32(x, order);
    for (int bit = 7; bit >= 0; --bit, x = _mm256_add_epi8(x, x)) {
      columns[8 * byte + bit] = static_cast<uint32_t>(_mm256_movemask_epi8(x));
    }
  };
  put(0, _mm256_unpacklo_epi64(ab_low, cd_low));
  put(1, _mm256_unpackhi_epi64(ab_low, cd_low));
  put(2, _mm256_unpacklo_epi64(ab_high, cd_high));
  put(3, _mm256_unpackhi_epi64(ab_high, cd_high));
}

}  // namespace

void attention_transpose_avx2(const int32_t* rows, int64_t stride, int64_t m, int64_t e, int64_t longest,
                              int32_t* tiles) {
  const int64_t words = word_count(longest), count = tile_count(e);
  for (int64_t tile = 0; tile < count; tile += 2) {
    for (int64_t w = 0; w < words; ++w) {
      alignas(32) uint32_t keys[32] = {}, channels[32];
      for (int64_t j = 32 * w; j < 32 * (w + 1) && j < m; ++j) {
        keys[j % 32] = static_cast<uint32_t>(rows[j * stride + tile / 2]);
      }
      transpose32(keys, channels);
      for (int64_t i = 0; i < 2 && tile + i < count; ++i) {
        std::memcpy(tiles + ((tile + i) * words + w) * kTileRows, channels + kTileRows * i, kTileRows * sizeof *tiles);
      }
    }
  }
}

}  // namespace bitmill::detail
