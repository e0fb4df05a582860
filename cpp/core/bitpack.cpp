// SPDX-License-Identifier: Apache-2.0
// The obvious form of packing rows, the choice of the instruction set, and what needs none: unpacking and weight tiles.
#include "bitpack.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "layout.h"

namespace bitmill {

float mean_by_halves(float* z, int64_t k) {
  if (k == 0) return 0.0f;
  const int64_t padded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(k)));
  std::fill(z + k, z + padded, 0.0f);
  for (int64_t half = padded / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) z[i] += z[i + half];
  }
  return z[0] / static_cast<float>(k);
}

namespace detail {
namespace {

template <class T>
void pack_rows(const BitpackParams& p, const T* x, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  std::vector<float> magnitudes(p.mean ? std::bit_ceil(static_cast<uint64_t>(p.k)) : 0);
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    int32_t count = 0;
    for (int64_t w = 0; w < words; ++w) {
      uint32_t sign = 0, nonzero = 0;
      for (int64_t j = 0; j < 32 && 32 * w + j < p.k; ++j) {
        const int64_t column = 32 * w + j;
        float z = to_float(input[column]);
        if (p.shift) z += p.shift[column];
        if (p.mean) magnitudes[column] = std::fabs(z);
        const bool bit = p.levels == Levels::sign ? z > 0 : p.levels == Levels::plus ? z >= 0 : z > p.threshold;
        sign |= static_cast<uint32_t>(bit) << j;
        nonzero |= static_cast<uint32_t>(z > 0 || z < 0) << j;
      }
      p.sign[row * words + w] = static_cast<int32_t>(sign);
      if (p.nonzero) p.nonzero[row * words + w] = static_cast<int32_t>(nonzero);
      count += std::popcount(p.levels == Levels::sign ? nonzero : sign);
    }
    if (p.count) p.count[row] = count;
    if (p.mean) p.mean[row] = mean_by_halves(magnitudes.data(), p.k);
  }
}

}  // namespace

void bitpack_rows_generic(const BitpackParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) { pack_rows(p, x, begin, end); });
}

namespace {

auto* choose_kernel() {
  switch (selected()) {
#ifdef BITMILL_NEON
    case InstructionSet::neon:
      return bitpack_rows_neon;
#endif
#ifdef BITMILL_AVX2
    case InstructionSet::avx2:
      return bitpack_rows_avx2;
#endif
#ifdef BITMILL_AVX512
    case InstructionSet::avx512:
      return bitpack_rows_avx512;
#endif
    default:
      return bitpack_rows_generic;
  }
}

}  // namespace
}  // namespace detail

Status bitpack(const BitpackParams& p) {
  if (p.m < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  const bool has_words = p.m > 0 && p.k > 0;  // an array without elements may be null
  if (has_words && (p.levels == Levels::sign) != (p.nonzero != nullptr)) return Status::bad_argument;
  auto* rows = detail::choose_kernel();
  split(p.parallel_for, p.m, nanoseconds_per_row(p), [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  return Status::ok;
}

double nanoseconds_per_row(const BitpackParams& p) { return static_cast<double>(p.k) * 0.05; }

BitpackParams rows_of(BitpackParams p, int64_t begin, int64_t end) {
  const int64_t words = word_count(p.k);
  p.x = static_cast<const char*>(p.x) + begin * p.row_stride * bytes_of(p.dtype);
  p.m = end - begin;
  p.sign += begin * words;
  if (p.nonzero) p.nonzero += begin * words;
  if (p.count) p.count += begin;
  if (p.mean) p.mean += begin;
  return p;
}

namespace {

constexpr uint64_t kLowestBits = 0x0101010101010101;

// Byte j is bit j.
constexpr std::array<uint64_t, 256> kBytesOfBits = [] {
  std::array<uint64_t, 256> bytes{};
  for (uint64_t b = 0; b < 256; ++b) {
    for (int j = 0; j < 8; ++j) bytes[b] |= (b >> j & 1) << (8 * j);
  }
  return bytes;
}();

uint32_t byte_of(uint32_t word, int i) { return word >> (8 * i) & 0xff; }

// Writes the `count` values of a word (at most 32), eight bytes at a time: `eight(i)` are values 8 i to 8 i + 7.
template <class T, class Eight>
void spread(T* out, int64_t count, Eight eight) {
  const int whole = static_cast<int>(count / 8);
  const auto put = [&](int i, size_t size) {
    const uint64_t bytes = eight(i);
    std::memcpy(out + 8 * i, &bytes, size);
  };
  if (whole == 4) {  // unrolled: nearly every word
    for (int i = 0; i < 4; ++i) put(i, 8);
    return;
  }
  for (int i = 0; i < whole; ++i) put(i, 8);
  if (count % 8 > 0) put(whole, static_cast<size_t>(count % 8));
}

}  // namespace

Status bitunpack(const int32_t* sign, const int32_t* nonzero, int64_t m, int64_t k, int8_t* values) {
  if (m < 0 || k < 0 || k > kMaxColumns) return Status::bad_size;
  const int64_t words = word_count(k);
  if (words == 0) return Status::ok;  // however many rows
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t w = 0; w < words; ++w) {
      const uint32_t plus = static_cast<uint32_t>(sign[row * words + w]);
      const uint32_t present = nonzero ? static_cast<uint32_t>(nonzero[row * words + w]) : ~0u;
      spread(values + row * k + 32 * w, std::min<int64_t>(k - 32 * w, 32), [&](int i) {
        const uint64_t minus_or_plus = ~(kBytesOfBits[byte_of(plus, i)] * 0xfe);  // 0 becomes -1, 1 becomes 1
        return minus_or_plus & (kBytesOfBits[byte_of(present, i)] * 0xff);
      });
    }
  }
  return Status::ok;
}

namespace {

// The lowest `bits` of each of up to values_per_word(bits) codes, as one word.
uint32_t word_of_codes(const uint8_t* codes, int64_t count, int bits) {
  uint32_t word = 0;
  if (bits == 1 && count == 32) {
    for (int i = 0; i < 4; ++i) {  // eight bytes to eight bits: byte j is shifted to bit 56 + j
      uint64_t bytes;
      std::memcpy(&bytes, codes + 8 * i, sizeof(bytes));
      word |= static_cast<uint32_t>(((bytes & kLowestBits) * 0x0102040810204080) >> 56) << (8 * i);
    }
    return word;
  }
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t v = 0; v < count; ++v) word |= (codes[v] & mask) << (bits * v);
  return word;
}

}  // namespace

Status tile_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, int32_t* tiles) {
  if (n < 0 || k < 0 || k > kMaxColumns) return Status::bad_size;
  if (bits != 1 && bits != 4 && bits != 8) return Status::bad_argument;
  const int64_t words = word_count(k, bits), values = values_per_word(bits);
  for (int64_t row = 0; row < tile_count(n) * kTileRows; ++row) {
    int32_t* lane = tiles + (row / kTileRows) * words * kTileRows + row % kTileRows;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t count = row < n ? std::min(k - values * w, values) : 0;
      const uint32_t word = count > 0 ? word_of_codes(codes + row * k + values * w, count, bits) : 0;
      lane[w * kTileRows] = static_cast<int32_t>(word);
    }
  }
  return Status::ok;
}

Status tile_unpack(const int32_t* tiles, int64_t n, int64_t k, int bits, uint8_t* codes) {
  if (n < 0 || k < 0 || k > kMaxColumns) return Status::bad_size;
  if (bits != 1 && bits != 4 && bits != 8) return Status::bad_argument;
  const int64_t words = word_count(k, bits), values = values_per_word(bits);
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t row = 0; row < n; ++row) {
    const int32_t* lane = tiles + (row / kTileRows) * words * kTileRows + row % kTileRows;
    for (int64_t w = 0; w < words; ++w) {
      const uint32_t word = static_cast<uint32_t>(lane[w * kTileRows]);
      const int64_t count = std::min(k - values * w, values);
      uint8_t* const out = codes + row * k + values * w;
      if (bits == 1) {
        spread(out, count, [&](int i) { return kBytesOfBits[byte_of(word, i)]; });
        continue;
      }
      for (int64_t v = 0; v < count; ++v) out[v] = static_cast<uint8_t>((word >> (bits * v)) & mask);
    }
  }
  return Status::ok;
}

}  // namespace bitmill
