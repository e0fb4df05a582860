// SPDX-License-Identifier: Apache-2.0
// Binary attention on the CPU. Schemas: python/bitmill/ops/binary_attention.py and binary_attention_bits.py.
#include "attention_ops.h"
#include "boxing.h"

namespace bitmill {
namespace {

class CpuAttention : public CpuCall {
 public:
  using CpuCall::CpuCall;

  // Where the kernels can find matrices: anywhere.
  static Tensor placed(const Tensor& t) { return t; }

  static Status attend(BinaryAttentionParams& p, const Rule& rule, const LearnedSteps& steps) {
    rule.read_steps(steps.q, steps.k, steps.a, p);
    if (steps.v) p.step = step_of(steps.a) * step_of(steps.v);
    if (steps.a) p.addend_step = step_of(steps.a);
    p.parallel_for = torch_parallel_for;
    return binary_attention(p);
  }
};

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("binary_attention", BITMILL_BOX(bitmill::binary_attention_op<bitmill::CpuAttention>));
  m.impl("binary_attention_bits", BITMILL_BOX(bitmill::binary_attention_bits_op<bitmill::CpuAttention>));
}
