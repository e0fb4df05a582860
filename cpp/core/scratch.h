// SPDX-License-Identifier: Apache-2.0
// Memory of a kernel while it runs, aligned to cache lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>

namespace bitmill::detail {

// Unnamed, so that what files for an instruction set make of the template stays theirs (.ci/check_symbols).
namespace {

template <class T>
class Scratch {
 public:
  // Numbers are not set.
  explicit Scratch(int64_t count) : data_(new (kAlignment) T[static_cast<size_t>(count)]) {}
  Scratch(int64_t count, const T& value) : Scratch(count) {
    for (int64_t i = 0; i < count; ++i) data_[i] = value;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete[](data_, kAlignment); }

  T* get() const { return data_; }
  operator T*() const { return data_; }
  explicit operator bool() const = delete;  // it is never null

 private:
  static_assert(std::is_trivially_destructible_v<T>);
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace

}  // namespace bitmill::detail
