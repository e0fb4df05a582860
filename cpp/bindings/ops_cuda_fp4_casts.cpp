// SPDX-License-Identifier: Apache-2.0
// The casts of the fp4 family on CUDA. Schemas: python/bitmill/ops/{fp4,nvfp4,codebook4}.py.
#include "boxing.h"
#include "cuda_call.h"
#include "fp4_casts.h"

namespace bitmill {
namespace {

class CudaCasts : public CudaCall {
 public:
  using CudaCall::CudaCall;

  Status run(const Fp4CastParams& p) const {
    const bool looks = p.nan == NanPolicy::error;
    const Tensor found = new_tensor({looks ? 1 : 0}, ScalarType::Int);
    return cuda::launch_fp4_cast(p, stream(), mutable_data<int32_t>(found));
  }
  Status run(const Mxfp4QuantizeParams& p) const { return cuda::launch_mxfp4_quantize(p, stream()); }
  Status run(const Nvfp4QuantizeParams& p) const { return cuda::launch_nvfp4_quantize(p, stream()); }
  Status run(const Nvfp4DequantizeParams& p) const { return cuda::launch_nvfp4_dequantize(p, stream()); }
  Status run(const Codebook4QuantizeParams& p) const { return cuda::launch_codebook4_quantize(p, stream()); }
  Status run(const Codebook4DequantizeParams& p) const { return cuda::launch_codebook4_dequantize(p, stream()); }
  Status fp4_uncast(const uint8_t* packed, int64_t m, int64_t k, Fp4Format format, float* values) const {
    return cuda::launch_fp4_uncast(packed, m, k, format, values, stream());
  }
  Status mxfp4_dequantize(const uint8_t* packed, const uint8_t* scale, int64_t m, int64_t k, float* values) const {
    return cuda::launch_mxfp4_dequantize(packed, scale, m, k, values, stream());
  }
  Status e8m0_cast(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes) const {
    return cuda::launch_e8m0_cast(x, dtype, count, up, bytes, stream());
  }
  Status e8m0_uncast(const uint8_t* bytes, int64_t count, float* values) const {
    return cuda::launch_e8m0_uncast(bytes, count, values, stream());
  }
};

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CUDA, m) { BITMILL_FP4_CASTS(m, CudaCasts); }
