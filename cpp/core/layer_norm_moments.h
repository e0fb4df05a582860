// SPDX-License-Identifier: Apache-2.0
// Mean and variance in the order of torch's kernel. A row is cut into vectors of 8 lanes. Every lane has a running mean
// of its own (Welford), begun anew every 16 vectors; these blocks are combined in pairs, and the pairs in pairs, and at
// the end the lanes one after the other, behind the columns that do not fill a vector.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace bitmill::detail {

inline constexpr int64_t kNormLanes = 8, kNormBlock = 16;

// Set::Value is a float, or floats side by side that are counted together: lanes, rows, or both. Set has all(float),
// add, subtract, multiply, divide and fma(a, b, c) = a * b + c.
template <class Set>
struct Moments {
  using Value = typename Set::Value;
  int64_t count;
  Value mean, squares;  // squares: the sum of (x - mean)^2

  static Moments none() { return {0, Set::all(0.0f), Set::all(0.0f)}; }

  // Of vectors: the squares of the distance are counted from two products.
  void combine_vectors(const Moments& other) {
    const Value delta = Set::subtract(other.mean, mean), weighted = Set::multiply(share_of(other), delta);
    squares =
        Set::fma(Set::multiply(delta, Set::all(static_cast<float>(count))), weighted, Set::add(squares, other.squares));
    mean = Set::add(mean, weighted);
    count += other.count;
  }

  // Of single values.
  void combine(const Moments& other) {
    const Value delta = Set::subtract(other.mean, mean), share = share_of(other);
    const Value weighted = Set::multiply(Set::multiply(delta, delta), share);
    mean = Set::fma(share, delta, mean);
    squares = Set::add(squares, Set::fma(weighted, Set::all(static_cast<float>(count)), other.squares));
    count += other.count;
  }

 private:
  Value share_of(const Moments& other) const {
    const int64_t both = count + other.count;
    return Set::all(both == 0 ? 0.0f : static_cast<float>(other.count) / static_cast<float>(both));
  }
};

// The moments of at most kNormBlock vectors, load(i) each.
template <class Set, class Load>
Moments<Set> moments_of_block(int64_t count, const Load& load) {
  static constexpr auto kShares = [] {  // of a value in the mean of those so far
    std::array<float, kNormBlock> shares{};
    for (int64_t i = 0; i < kNormBlock; ++i) shares[static_cast<size_t>(i)] = 1.0f / static_cast<float>(i + 1);
    return shares;
  }();
  using Value = typename Set::Value;
  Value mean = Set::all(0.0f), squares = Set::all(0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const Value x = load(i), delta = Set::subtract(x, mean);
    mean = Set::fma(Set::all(kShares[static_cast<size_t>(i)]), delta, mean);
    squares = Set::fma(delta, Set::subtract(x, mean), squares);
  }
  return {count, mean, squares};
}

// Blocks in the order they come: a binary counter, whose level i holds the moments of 2^i of them.
template <class Set>
class Cascade {
 public:
  // Of a row of so many vectors.
  void begin(int64_t vectors) {
    while ((kNormBlock << depth_) < vectors) ++depth_;
    for (int i = 0; i < depth_ || i == 0; ++i) level_[i] = Moments<Set>::none();
  }

  void add(const Moments<Set>& block) {
    level_[0].combine_vectors(block);
    int64_t filled = ++blocks_;
    for (int i = 1; i < depth_ && filled % 2 == 0; ++i, filled /= 2) {
      level_[i].combine_vectors(level_[i - 1]);
      level_[i - 1] = Moments<Set>::none();
    }
  }

  const Moments<Set>& sum() {
    for (int i = 1; i < depth_; ++i) level_[0].combine_vectors(level_[i]);
    return level_[0];
  }

 private:
  int depth_ = 0;
  int64_t blocks_ = 0;
  Moments<Set> level_[24];  // no row has 2^24 blocks
};

// The moments of a whole row (or of some rows side by side): columns [first, n), load(column) each, then the lanes,
// lane(i) each.
template <class Set, class Load, class Lane>
Moments<Set> moments_of_row(int64_t first, int64_t n, const Load& load, const Lane& lane) {
  using Value = typename Set::Value;
  Moments<Set> row = Moments<Set>::none();
  for (int64_t column = first; column < n; ++column) {
    const Value x = load(column), delta = Set::subtract(x, row.mean);
    ++row.count;
    row.mean = Set::add(row.mean, Set::divide(delta, Set::all(static_cast<float>(row.count))));
    row.squares = Set::add(row.squares, Set::multiply(delta, Set::subtract(x, row.mean)));
  }
  for (int64_t i = 0; i < kNormLanes; ++i) row.combine(lane(i));
  return row;
}

}  // namespace bitmill::detail
