// SPDX-License-Identifier: Apache-2.0
// The obvious form of the partially binarised product. No sign bit is looked up twice: the sign plane is multiplied as
// if the salient weights were b = -1 (their bit is 0), and the scattered entries put that right afterwards:
//   y = sum_g [ alpha_g S_g + mu_g X_g ] + sum_{salient c} x_c (value - (mu_g(c) - alpha_g(c)))
// with S_g = sum of +-x over the sign bits of group g and X_g = sum of x over its columns (one for all outputs).
#include "salient_scatter.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

#include "layout.h"
#include "panel_matmul.h"

namespace bitmill {
namespace {

// Activation rows that are multiplied together: what bounds the scratch memory.
constexpr int64_t kRowBlock = 256;

int64_t group_width(const SalientWeight& w) { return w.group_size > 0 ? w.group_size : std::max<int64_t>(w.k, 1); }
int64_t group_count(const SalientWeight& w) { return w.group_size > 0 ? ceil_div(w.k, w.group_size) : 1; }

// The columns below k of a word.
uint32_t columns_of_word(const SalientWeight& w, int64_t word) {
  const int64_t columns = w.k - 32 * word;
  return columns >= 32 ? ~0u : (1u << columns) - 1;
}

float binary_value(const SalientWeight& w, int64_t row, int64_t group, float sign) {
  const int64_t i = row * group_count(w) + group;
  const float scaled = w.alpha[i] * sign;
  return w.mu ? w.mu[i] + scaled : scaled;
}

float salient_value(const SalientWeight& w, int64_t row, int64_t entry) {
  if (!w.value_scale) return to_float(static_cast<const Float16*>(w.value)[entry]);
  const float code = static_cast<float>(static_cast<const uint8_t*>(w.value)[entry]);
  return w.value_scale[row] * (code - w.value_zero[row]);
}

// Calls each(column, value) for the salient weights of a row, columns ascending.
template <class Each>
void walk_row(const SalientWeight& w, int64_t row, const Each& each) {
  const int64_t words = word_count(w.k);
  const int32_t* mask = w.mask + (row / kTileRows) * words * kTileRows + row % kTileRows;
  int64_t entry = w.start[row];
  for (int64_t word = 0; word < words; ++word) {
    uint32_t bits = static_cast<uint32_t>(mask[word * kTileRows]) & columns_of_word(w, word);
    for (; bits; bits &= bits - 1) each(32 * word + std::countr_zero(bits), salient_value(w, row, entry++));
  }
}

bool tile_is_consistent(const SalientWeight& w, int64_t tile) {
  const int64_t words = word_count(w.k);
  int64_t count[kTileRows] = {};
  uint32_t both[kTileRows] = {};
  for (int64_t word = 0; word < words; ++word) {
    const uint32_t columns = columns_of_word(w, word);
    const int64_t first = (tile * words + word) * kTileRows;
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      const uint32_t bits = static_cast<uint32_t>(w.mask[first + lane]) & columns;
      count[lane] += std::popcount(bits);
      both[lane] |= bits & static_cast<uint32_t>(w.sign[first + lane]);
    }
  }
  for (int64_t lane = 0; lane < std::min(kTileRows, w.n - tile * kTileRows); ++lane) {
    const int32_t* start = w.start + tile * kTileRows + lane;
    if (both[lane] || count[lane] != int64_t{start[1]} - start[0]) return false;
  }
  return true;
}

// What the salient weights of outputs [begin, end) add: correction[row n + output].
template <class T>
void salient_sums(const SalientWeight& w, const T* x, int64_t m, int64_t begin, int64_t end, float* correction) {
  const int64_t width = group_width(w);
  std::vector<int64_t> columns;
  std::vector<float> differences;
  for (int64_t output = begin; output < end; ++output) {
    columns.clear();
    differences.clear();
    walk_row(w, output, [&](int64_t column, float value) {
      columns.push_back(column);
      differences.push_back(value - binary_value(w, output, column / width, -1.0f));
    });
    for (int64_t row = 0; row < m; ++row) {
      float sum = 0.0f;
      for (size_t i = 0; i < columns.size(); ++i) sum += to_float(x[row * w.k + columns[i]]) * differences[i];
      correction[row * w.n + output] = sum;
    }
  }
}

// X_g of activation rows [begin, end).
template <class T>
void group_totals(const SalientWeight& w, const T* x, int64_t begin, int64_t end, float* totals) {
  const int64_t width = group_width(w), groups = group_count(w);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      float sum = 0.0f;
      for (int64_t c = group * width; c < std::min(w.k, (group + 1) * width); ++c) sum += to_float(x[row * w.k + c]);
      totals[row * groups + group] = sum;
    }
  }
}

template <class T>
void multiply_rows(const SalientMatmulParams& p, const T* x, int64_t m, T* out) {
  const SalientWeight& w = p.weight;
  const int64_t words = word_count(w.k), groups = group_count(w);
  std::vector<float> totals(w.mu ? m * groups : 0), correction(m * w.n);
  if (w.mu) {
    split(p.parallel_for, m, static_cast<double>(w.k),
          [&](int64_t begin, int64_t end) { group_totals(w, x, begin, end, totals.data()); });
  }
  const double entries_a_row = w.n > 0 ? static_cast<double>(w.entries) / static_cast<double>(w.n) : 0.0;
  split(p.parallel_for, w.n, static_cast<double>(words) + entries_a_row * static_cast<double>(m + 2),
        [&](int64_t begin, int64_t end) { salient_sums(w, x, m, begin, end, correction.data()); });
  const auto decode = [&](int64_t tile, int64_t begin, int64_t end, float* panel) {
    for (int64_t j = begin; j < end; ++j) {
      const int32_t* word = w.sign + (tile * words + j / 32) * kTileRows;
      for (int64_t lane = 0; lane < kTileRows; ++lane) {
        const bool plus = (static_cast<uint32_t>(word[lane]) >> (j % 32)) & 1u;
        panel[(j - begin) * kTileRows + lane] = plus ? 1.0f : -1.0f;
      }
    }
  };
  const auto finish = [&](int64_t row, int64_t tile, int64_t lane, int64_t group, float sum, float& value) {
    const int64_t i = (tile * kTileRows + lane) * groups + group;
    value += w.alpha[i] * sum;
    if (w.mu) value += w.mu[i] * totals[row * groups + group];
  };
  const auto done = [&](int64_t row, int64_t tile, int64_t lane, float value) {
    const int64_t output = tile * kTileRows + lane;
    value += correction[row * w.n + output];
    return p.bias ? value + p.bias[output] : value;
  };
  const detail::PanelShape shape{m, w.n, w.k, w.group_size};
  detail::panel_matmul(shape, x, out, p.parallel_for, decode, finish, done);
}

}  // namespace

Status salient_check(const SalientWeight& w, ParallelFor parallel_for) {
  if (w.n < 0 || w.k < 0 || w.entries < 0 || w.k > kMaxColumns) return Status::bad_size;
  if (w.group_size < 0 || w.group_size % 32 != 0) return Status::bad_argument;
  if ((w.value_scale == nullptr) != (w.value_zero == nullptr)) return Status::bad_argument;
  if (w.start[0] != 0 || w.start[w.n] != w.entries) return Status::corrupt;
  for (int64_t row = 0; row < w.n; ++row) {
    if (w.start[row] > w.start[row + 1]) return Status::corrupt;
  }
  std::atomic<bool> consistent = true;
  const double nanoseconds = static_cast<double>(word_count(w.k)) * kTileRows * 0.2;
  split(parallel_for, tile_count(w.n), nanoseconds, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (!tile_is_consistent(w, tile)) consistent = false;
    }
  });
  return consistent ? Status::ok : Status::corrupt;
}

Status salient_matmul(const SalientMatmulParams& p) {
  if (p.m < 0) return Status::bad_size;
  const Status status = salient_check(p.weight, p.parallel_for);
  if (status != Status::ok) return status;
  with_dtype(p.dtype, p.out, [&]<class T>(T* out) {
    for (int64_t row = 0; row < p.m; row += kRowBlock) {
      const T* x = static_cast<const T*>(p.x) + row * p.weight.k;
      multiply_rows(p, x, std::min(kRowBlock, p.m - row), out + row * p.weight.n);
    }
  });
  return Status::ok;
}

Status salient_dequantize(const SalientWeight& w, float* dense, ParallelFor parallel_for) {
  const Status status = salient_check(w, parallel_for);
  if (status != Status::ok) return status;
  const int64_t words = word_count(w.k), width = group_width(w);
  split(parallel_for, w.n, static_cast<double>(w.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* sign = w.sign + (row / kTileRows) * words * kTileRows + row % kTileRows;
      for (int64_t c = 0; c < w.k; ++c) {
        const bool plus = (static_cast<uint32_t>(sign[(c / 32) * kTileRows]) >> (c % 32)) & 1u;
        dense[row * w.k + c] = binary_value(w, row, c / width, plus ? 1.0f : -1.0f);
      }
      walk_row(w, row, [&](int64_t column, float value) { dense[row * w.k + column] = value; });
    }
  });
  return Status::ok;
}

}  // namespace bitmill
