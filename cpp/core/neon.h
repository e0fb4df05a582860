// SPDX-License-Identifier: Apache-2.0
// What the NEON files share: 4 floats to and from memory in each dtype.
#pragma once

#include <arm_neon.h>

#include "floats.h"

namespace bitmill::detail {

static inline float32x4_t load4(const float* x) { return vld1q_f32(x); }
static inline float32x4_t load4(const BFloat16* x) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&x->bits), 16));
}
static inline float32x4_t load4(const Float16* x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&x->bits))); }

static inline void store4(float* out, float32x4_t value) { vst1q_f32(out, value); }
static inline void store4(Float16* out, float32x4_t value) {
  vst1_u16(&out->bits, vreinterpret_u16_f16(vcvt_f16_f32(value)));
}
static inline void store4(BFloat16* out, float32x4_t value) {
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint32x4_t number = vceqq_f32(value, value);
  vst1_u16(&out->bits, vmovn_u32(vbslq_u32(number, vshrq_n_u32(rounded, 16), vdupq_n_u32(0x7FC0))));
}

}  // namespace bitmill::detail
