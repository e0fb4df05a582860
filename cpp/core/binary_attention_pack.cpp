// SPDX-License-Identifier: Apache-2.0
// Packing the operands of binary attention, from floats or from rows of bits: queries to rows, keys and values to
// tiles.
#include <algorithm>
#include <cstring>
#include <memory>

#include "binary_attention_task.h"
#include "bitpack.h"
#include "cpu.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

// A matrix [rows, columns] whose columns lie side by side: where it is, or in `copy`.
struct Rows {
  const void* x;
  int64_t stride;
};

template <class T>
Rows rows_of(const Matrices& matrices, const T* data, int64_t matrix, int64_t first, int64_t rows, int64_t columns,
             std::unique_ptr<char[]>& copy) {
  const T* x = data + matrices.offset[matrix] + first * matrices.row_stride;
  if (matrices.column_stride == 1) return {x, matrices.row_stride};
  copy.reset(new char[static_cast<size_t>(rows * columns) * sizeof(T)]);
  T* to = reinterpret_cast<T*>(copy.get());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      std::memcpy(to + i * columns + j, x + i * matrices.row_stride + j * matrices.column_stride, sizeof(T));
    }
  }
  return {to, columns};
}

Rows rows_of(const BinaryAttentionParams& p, const Matrices& matrices, int64_t matrix, int64_t first, int64_t rows,
             int64_t columns, std::unique_ptr<char[]>& copy) {
  return with_dtype(p.dtype, matrices.data,
                    [&](const auto* data) { return rows_of(matrices, data, matrix, first, rows, columns, copy); });
}

// Bits of rows of `columns` values, and whether one of these is 0.
bool pack_rows(const BinaryAttentionParams& p, const Rows& x, int64_t rows, int64_t columns, int32_t* sign,
               int32_t* nonzero) {
  const std::unique_ptr<int32_t[]> count(new int32_t[static_cast<size_t>(rows)]);
  BitpackParams pack;
  pack.x = x.x;
  pack.row_stride = x.stride;
  pack.dtype = p.dtype;
  pack.m = rows;
  pack.k = columns;
  pack.levels = p.zeros ? Levels::sign : Levels::plus;
  pack.sign = sign;
  pack.nonzero = p.zeros ? nonzero : nullptr;
  pack.count = count.get();
  bitpack(pack);
  return p.zeros && std::any_of(count.get(), count.get() + rows, [&](int32_t c) { return c != columns; });
}

// Signs alone, where that is all there is to pack.
bool packed_without_zeros([[maybe_unused]] const BinaryAttentionParams& p, [[maybe_unused]] const Rows& x,
                          [[maybe_unused]] int64_t rows, [[maybe_unused]] bool tiles, [[maybe_unused]] int32_t* out) {
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) return !attention_signs_avx512(p, x.x, x.stride, rows, tiles, out);
#endif
  return false;
}

// Rows of words, `stride` apart, to tiles, 0 past the rows.
void to_tiles(const int32_t* rows, int64_t stride, int64_t count, int64_t words, int64_t tiles, int32_t* out) {
  std::fill_n(out, tiles * words * kTileRows, 0);
  for (int64_t row = 0; row < count; ++row) {
    int32_t* lane = out + row / kTileRows * words * kTileRows + row % kTileRows;
    for (int64_t w = 0; w < words; ++w) lane[w * kTileRows] = rows[row * stride + w];
  }
}

// One head of some packed rows, each of `words` words.
struct HeadRows {
  const int32_t *sign, *nonzero;
  int64_t stride, words;
};

HeadRows head_of(const AttentionTask& t, const AttentionRows& rows, const int64_t* first, int64_t batch,
                 int64_t columns) {
  const int64_t words = columns / 32;
  const int64_t at = first[t.sequence(batch)] * rows.stride + batch % t.p.bits.heads * words;
  return {rows.sign + at, rows.nonzero ? rows.nonzero + at : nullptr, rows.stride, words};
}

bool has_zeros(const HeadRows& head, int64_t rows) {
  for (int64_t row = 0; head.nonzero && row < rows; ++row) {
    for (int64_t w = 0; w < head.words; ++w) {
      if (head.nonzero[row * head.stride + w] != -1) return true;
    }
  }
  return false;
}

// Bits [rows, columns] to bits [columns, rows] in tiles.
void transpose(const int32_t* rows, int64_t stride, int64_t m, int64_t e, int64_t longest, int32_t* tiles) {
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) return attention_transpose_avx2(rows, stride, m, e, longest, tiles);
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) return attention_transpose_avx512(rows, stride, m, e, longest, tiles);
#endif
  const int64_t words = word_count(longest);
  std::fill_n(tiles, tile_count(e) * words * kTileRows, 0);
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t c = 0; c < e; ++c) {
      const uint32_t bit = static_cast<uint32_t>(rows[j * stride + c / 32]) >> (c % 32) & 1u;
      tiles[(c / kTileRows * words + j / 32) * kTileRows + c % kTileRows] |= static_cast<int32_t>(bit << (j % 32));
    }
  }
}

}  // namespace

void pack_keys(const AttentionTask& t, int64_t batch) {
  const int64_t m = t.p.m, size = key_tiles(m) * t.words * kTileRows;
  int32_t* tiles = t.k_sign + batch * size;
  if (t.p.bits.heads) {
    const HeadRows head = head_of(t, t.p.bits.k, t.p.bits.k_first, batch, t.p.d);
    const int64_t rows = t.key_rows(batch);
    to_tiles(head.sign, head.stride, rows, t.words, key_tiles(m), tiles);
    t.k_zeros[batch] = has_zeros(head, rows);
    if (!t.k_zeros[batch]) return;
    return to_tiles(head.nonzero, head.stride, rows, t.words, key_tiles(m), t.k_nonzero + batch * size);
  }
  std::unique_ptr<char[]> copy;
  const Rows x = rows_of(t.p, t.p.k, batch, 0, m, t.p.d, copy);
  const int64_t last = std::max<int64_t>(size - 2 * t.words * kTileRows, 0);
  std::fill(tiles + last, tiles + size, 0);  // lanes past m
  t.k_zeros[batch] = 0;
  if (packed_without_zeros(t.p, x, m, true, tiles)) return;
  const std::unique_ptr<int32_t[]> sign(new int32_t[static_cast<size_t>(m * t.words)]);
  const std::unique_ptr<int32_t[]> nonzero(new int32_t[static_cast<size_t>(m * t.words)]);
  t.k_zeros[batch] = pack_rows(t.p, x, m, t.p.d, sign.get(), nonzero.get());
  to_tiles(sign.get(), t.words, m, t.words, key_tiles(m), tiles);
  if (t.k_zeros[batch]) to_tiles(nonzero.get(), t.words, m, t.words, key_tiles(m), t.k_nonzero + batch * size);
}

void pack_values(const AttentionTask& t, int64_t batch) {
  const int64_t m = t.p.m, e = t.p.e, size = tile_count(e) * t.map_words * kTileRows;
  int32_t* sign = t.v_sign + batch * size;
  int32_t* nonzero = t.v_nonzero ? t.v_nonzero + batch * size : nullptr;
  if (t.p.bits.heads) {
    const HeadRows head = head_of(t, t.p.bits.v, t.p.bits.k_first, batch, e);
    const int64_t rows = t.key_rows(batch);
    transpose(head.sign, head.stride, rows, e, m, sign);
    t.v_zeros[batch] = has_zeros(head, rows);
    if (t.v_zeros[batch]) transpose(head.nonzero, head.stride, rows, e, m, nonzero);
    return;
  }
  std::unique_ptr<char[]> copy;
  const Rows x = rows_of(t.p, t.p.v, batch, 0, m, e, copy);
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) {
    t.v_zeros[batch] = attention_values_avx512(t.p.dtype, x.x, x.stride, m, e, sign, nonzero);
    return;
  }
#endif
  const int64_t words = word_count(e);
  const std::unique_ptr<int32_t[]> rows(new int32_t[static_cast<size_t>(2 * m * words)]);
  int32_t* rows_nonzero = rows.get() + m * words;
  t.v_zeros[batch] = pack_rows(t.p, x, m, e, rows.get(), rows_nonzero);
  transpose(rows.get(), words, m, e, m, sign);
  if (t.v_zeros[batch]) transpose(rows_nonzero, words, m, e, m, nonzero);
}

bool pack_queries(const AttentionTask& t, int64_t batch, int64_t first, int64_t last, bool always, int32_t* sign,
                  int32_t* nonzero) {
  if (t.p.bits.heads) {
    HeadRows head = head_of(t, t.p.bits.q, t.p.bits.q_first, batch, t.p.d);
    head.sign += first * head.stride;
    if (head.nonzero) head.nonzero += first * head.stride;
    const bool zeros = has_zeros(head, last - first);
    for (int64_t row = 0; row < last - first; ++row) {
      std::copy_n(head.sign + row * head.stride, t.words, sign + row * t.words);
      if (zeros) std::copy_n(head.nonzero + row * head.stride, t.words, nonzero + row * t.words);
    }
    if (always && !zeros) std::fill_n(nonzero, (last - first) * t.words, -1);
    return zeros;
  }
  std::unique_ptr<char[]> copy;
  const Rows x = rows_of(t.p, t.p.q, batch, first, last - first, t.p.d, copy);
  if (!always && packed_without_zeros(t.p, x, last - first, false, sign)) return false;
  return pack_rows(t.p, x, last - first, t.p.d, sign, nonzero);
}

}  // namespace bitmill::detail
