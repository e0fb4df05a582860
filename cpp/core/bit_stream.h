// SPDX-License-Identifier: Apache-2.0
// Writing a row of bits piece by piece, the lowest bits of a word first.
#pragma once

#include <cstdint>
#include <cstring>

namespace bitmill::detail {

static inline uint32_t low_bits(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// Pieces of any size.
struct BitWriter {
  int32_t* out;
  uint64_t held = 0;  // `count` bits, below 32 of them
  int64_t count = 0;

  // `bits` has nothing past its first `size` bits, at most 32.
  void put(uint32_t bits, int64_t size) {
    held |= uint64_t{bits} << count;
    count += size;
    if (count < 32) return;
    *out++ = static_cast<int32_t>(held);
    held >>= 32;
    count -= 32;
  }
  void skip(int64_t size) {
    for (; size > 0; size -= 32) put(0, size < 32 ? size : 32);
  }
  // Bits [from, from + size) of another row, of which one word past the end is readable.
  void copy(const int32_t* row, int64_t from, int64_t size) {
    for (; size > 0; from += 32, size -= 32) {
      const int64_t word = from / 32, piece = size < 32 ? size : 32;
      const uint64_t low = static_cast<uint32_t>(row[word]), high = static_cast<uint32_t>(row[word + 1]);
      put(static_cast<uint32_t>((low | high << 32) >> (from % 32)) & low_bits(piece), piece);
    }
  }
  void finish() {
    if (count > 0) *out = static_cast<int32_t>(held);
  }
};

// Pieces that are whole words, at whole words.
struct WordWriter {
  int32_t* out;

  void skip(int64_t size) {
    for (; size > 0; size -= 32) *out++ = 0;
  }
  void copy(const int32_t* row, int64_t from, int64_t size) {
    const int32_t* word = row + from / 32;
    for (; size >= 64; size -= 64, word += 2, out += 2) std::memcpy(out, word, 8);
    if (size > 0) *out++ = *word;
  }
  void finish() {}
};

}  // namespace bitmill::detail
