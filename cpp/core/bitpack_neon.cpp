// SPDX-License-Identifier: Apache-2.0
// Packing with NEON: 32 values become one word by eight compares, each masking its own four bits of the word. Bit-equal
// to the generic form.
#include "bitpack_rows.h"
#include "neon.h"

namespace bitmill::detail {
namespace {

struct Neon {
  template <Levels levels, class T>
  static PackedWord pack_word(const T* x, const float* shift, float threshold, float* magnitudes) {
    const float32x4_t zero = vdupq_n_f32(0.0f), bound = vdupq_n_f32(threshold);
    uint32x4_t bit = {1, 2, 4, 8}, sign = vdupq_n_u32(0), nonzero = sign;
    for (int i = 0; i < 32; i += 4) {
      float32x4_t z = load4(x + i);
      if (shift) z = vaddq_f32(z, vld1q_f32(shift + i));
      if (magnitudes) vst1q_f32(magnitudes + i, vabsq_f32(z));
      uint32x4_t above;
      if constexpr (levels == Levels::sign) {
        above = vcgtq_f32(z, zero);
        nonzero = vorrq_u32(nonzero, vandq_u32(vcgtq_f32(vabsq_f32(z), zero), bit));
      } else if constexpr (levels == Levels::plus) {
        above = vcgeq_f32(z, zero);
      } else {
        above = vcgtq_f32(z, bound);
      }
      sign = vorrq_u32(sign, vandq_u32(above, bit));
      bit = vshlq_n_u32(bit, 4);
    }
    return {vaddvq_u32(sign), vaddvq_u32(nonzero)};
  }
};

}  // namespace

void bitpack_rows_neon(const BitpackParams& p, int64_t begin, int64_t end) { pack_rows<Neon>(p, begin, end); }

}  // namespace bitmill::detail
