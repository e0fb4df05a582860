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
  const auto load = [&](int i) { return load_bits(rows + i); };
  split_bytes(load(0), load(8), load(16), load(24), [&](int byte, __m256i bytes) {
    __m256i x = in_order(bytes);
    for (int bit = 7; bit >= 0; --bit, x = _mm256_add_epi8(x, x)) {
      columns[8 * byte + bit] = static_cast<uint32_t>(_mm256_movemask_epi8(x));
    }
  });
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
