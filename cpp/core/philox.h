// SPDX-License-Identifier: Apache-2.0
// The random numbers of stochastic rounding: Philox4x32-10 (Salmon et al., SC 2011), a function of a counter and a key.
// The number of element e of a tensor, e its index in row-major order, is word e % 4 of what these four words become:
//   counter: lower and upper half of e / 4, lower and upper half of offset;   key: lower and upper half of seed.
// It depends on nothing else: neither on threads or the order of work, nor on the device.
#pragma once

#include <cstdint>

namespace bitmill {

struct RandomStream {
  uint64_t seed = 0, offset = 0;
};

struct PhiloxBlock {
  uint32_t word[4];
};

static constexpr PhiloxBlock philox(uint64_t block, RandomStream stream) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream.offset), c3 = static_cast<uint32_t>(stream.offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The numbers of elements one after the other, a block for four of them.
class RandomWords {
 public:
  explicit RandomWords(RandomStream stream) : stream_(stream) {}
  uint32_t operator()(uint64_t element) {
    if (element / 4 != block_) {
      block_ = element / 4;
      words_ = philox(block_, stream_);
    }
    return words_.word[element % 4];
  }

 private:
  RandomStream stream_;
  uint64_t block_ = ~uint64_t{0};  // of no element: e / 4 is smaller
  PhiloxBlock words_{};
};

}  // namespace bitmill
