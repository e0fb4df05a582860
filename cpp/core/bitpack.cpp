// SPDX-License-Identifier: Apache-2.0
// The obvious form of every packing function, and the choice of the instruction set.
#include "bitpack.h"

#include <algorithm>
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

Status bitunpack(const int32_t* sign, const int32_t* nonzero, int64_t m, int64_t k, int8_t* values) {
  if (m < 0 || k < 0 || k > kMaxColumns) return Status::bad_size;
  const int64_t words = word_count(k);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < k; ++column) {
      const int64_t word = row * words + column / 32;
      const int bit = static_cast<int>(column % 32);
      const int value = 2 * static_cast<int>((static_cast<uint32_t>(sign[word]) >> bit) & 1u) - 1;
      const bool present = !nonzero || ((static_cast<uint32_t>(nonzero[word]) >> bit) & 1u);
      values[row * k + column] = static_cast<int8_t>(present ? value : 0);
    }
  }
  return Status::ok;
}

Status tile_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, int32_t* tiles) {
  if (n < 0 || k < 0 || k > kMaxColumns) return Status::bad_size;
  if (bits != 1 && bits != 4 && bits != 8) return Status::bad_argument;
  const int64_t words = word_count(k, bits), values = values_per_word(bits);
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t tile = 0; tile < tile_count(n); ++tile) {
    for (int64_t w = 0; w < words; ++w) {
      for (int64_t lane = 0; lane < kTileRows; ++lane) {
        const int64_t row = kTileRows * tile + lane;
        uint32_t word = 0;
        for (int64_t v = 0; row < n && v < values && values * w + v < k; ++v) {
          word |= (codes[row * k + values * w + v] & mask) << (bits * v);
        }
        tiles[(tile * words + w) * kTileRows + lane] = static_cast<int32_t>(word);
      }
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
    for (int64_t column = 0; column < k; ++column) {
      const uint32_t word = static_cast<uint32_t>(lane[(column / values) * kTileRows]);
      codes[row * k + column] = static_cast<uint8_t>((word >> (bits * (column % values))) & mask);
    }
  }
  return Status::ok;
}

}  // namespace bitmill
