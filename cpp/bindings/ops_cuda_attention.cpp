// SPDX-License-Identifier: Apache-2.0
// Binary attention on CUDA. Schemas: python/bitmill/ops/binary_attention.py and binary_attention_bits.py.
#include "attention_ops.h"
#include "boxing.h"
#include "cuda_call.h"

namespace bitmill {
namespace {

class CudaAttention : public CudaCall {
 public:
  using CudaCall::CudaCall;

  // Where the kernels can find matrices: at two even distances.
  static Tensor placed(const Tensor& t) { return t.dim() <= 4 ? t : as_contiguous(t); }

  // Steps stay on the GPU: nothing waits for it.
  Status attend(const BinaryAttentionParams& p, const Rule& rule, const LearnedSteps& learned) const {
    cuda::AttentionSteps steps;
    steps.q = data_or_null<float>(learned.q);
    steps.k = data_or_null<float>(learned.k);
    steps.a = data_or_null<float>(learned.a);
    steps.v = data_or_null<float>(learned.v);
    steps.scaling = rule.scaling ? *rule.scaling : Rule::root(p);
    steps.divide = !rule.scaling;
    const Tensor scratch = new_tensor({cuda::binary_attention_scratch(p)}, ScalarType::Int);
    const Status status = cuda::launch_binary_attention(p, mutable_data<int32_t>(scratch), stream(), steps);
    if (status == Status::bad_argument) {
      fail(rule.op,
           ": mask and value_addend must be the same along all leading dimensions but two on a GPU, got another",
           " pattern; flatten the leading dimensions of all operands to [batch, heads]");
    }
    return status;
  }
};

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CUDA, m) {
  m.impl("binary_attention", BITMILL_BOX(bitmill::binary_attention_op<bitmill::CudaAttention>));
  m.impl("binary_attention_bits", BITMILL_BOX(bitmill::binary_attention_bits_op<bitmill::CudaAttention>));
}
