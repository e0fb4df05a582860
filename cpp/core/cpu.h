// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs. Chosen once by CPUID; tests and experts may force another one that this machine has.
#pragma once

namespace bitmill {

enum class InstructionSet {
  generic,  // plain C++20
  neon,     // every aarch64
  avx2,     // AVX2, FMA, F16C and POPCNT (Haswell, Zen and later)
  avx512,   // AVX-512 F, BW, DQ, VL and VPOPCNTDQ (Ice Lake, Zen 4 and later)
};

// The widest last.
inline constexpr InstructionSet kInstructionSets[] = {InstructionSet::generic, InstructionSet::neon,
                                                      InstructionSet::avx2, InstructionSet::avx512};

const char* name(InstructionSet set);
bool available(InstructionSet set);
InstructionSet best();
InstructionSet selected();
bool select(InstructionSet set);  // false, and no change, if this machine does not have it

// Whether kernels for 8 floats at a time serve the selected set: AVX2, and NEON in pairs of registers (avx2_on_neon.h).
bool eight_lanes();

// Extensions that single kernels ask for on top of avx512.
bool has_int8_dot();  // VNNI, VBMI and VBMI2
bool has_bf16_dot();  // BF16

// Whether lines that will be written are worth asking for: AMD's cores from Zen 5 on wait for enough of them at once,
// and would only pay for the instructions.
bool asks_for_writes();

// Which functions have a kernel of their own for a set beyond the generic one. Everything else runs generic code.
struct KernelRow {
  InstructionSet set;
  const char* function;
};
inline constexpr KernelRow kKernels[] = {{InstructionSet::neon, "binary_attention"},
                                         {InstructionSet::neon, "binary_embedding"},
                                         {InstructionSet::neon, "binary_matmul"},
                                         {InstructionSet::neon, "binary_weight_linear"},
                                         {InstructionSet::neon, "bitpack"},
                                         {InstructionSet::neon, "codebook4_dequantize"},
                                         {InstructionSet::neon, "codebook4_quantize"},
                                         {InstructionSet::neon, "decode_attention"},
                                         {InstructionSet::neon, "e8m0_cast"},
                                         {InstructionSet::neon, "e8m0_uncast"},
                                         {InstructionSet::neon, "fp4_activations"},
                                         {InstructionSet::neon, "fp4_cast"},
                                         {InstructionSet::neon, "fp4_fp4_linear"},
                                         {InstructionSet::neon, "fp4_linear"},
                                         {InstructionSet::neon, "fp4_uncast"},
                                         {InstructionSet::neon, "fp4_weight"},
                                         {InstructionSet::neon, "int8_quantize"},
                                         {InstructionSet::neon, "layer_norm"},
                                         {InstructionSet::neon, "mxfp4_dequantize"},
                                         {InstructionSet::neon, "mxfp4_quantize"},
                                         {InstructionSet::neon, "nvfp4_dequantize"},
                                         {InstructionSet::neon, "nvfp4_quantize"},
                                         {InstructionSet::neon, "prompt_attention"},
                                         {InstructionSet::neon, "salient_linear"},
                                         {InstructionSet::neon, "zoned_linear"},
                                         {InstructionSet::avx2, "binary_attention"},
                                         {InstructionSet::avx2, "binary_embedding"},
                                         {InstructionSet::avx2, "binary_matmul"},
                                         {InstructionSet::avx2, "binary_weight_linear"},
                                         {InstructionSet::avx2, "bitpack"},
                                         {InstructionSet::avx2, "codebook4_dequantize"},
                                         {InstructionSet::avx2, "codebook4_quantize"},
                                         {InstructionSet::avx2, "decode_attention"},
                                         {InstructionSet::avx2, "e8m0_cast"},
                                         {InstructionSet::avx2, "e8m0_uncast"},
                                         {InstructionSet::avx2, "fp4_activations"},
                                         {InstructionSet::avx2, "fp4_cast"},
                                         {InstructionSet::avx2, "fp4_fp4_linear"},
                                         {InstructionSet::avx2, "fp4_linear"},
                                         {InstructionSet::avx2, "fp4_uncast"},
                                         {InstructionSet::avx2, "fp4_weight"},
                                         {InstructionSet::avx2, "int8_quantize"},
                                         {InstructionSet::avx2, "layer_norm"},
                                         {InstructionSet::avx2, "mxfp4_dequantize"},
                                         {InstructionSet::avx2, "mxfp4_quantize"},
                                         {InstructionSet::avx2, "nvfp4_dequantize"},
                                         {InstructionSet::avx2, "nvfp4_quantize"},
                                         {InstructionSet::avx2, "prompt_attention"},
                                         {InstructionSet::avx2, "salient_linear"},
                                         {InstructionSet::avx2, "zoned_linear"},
                                         {InstructionSet::avx512, "binary_attention"},
                                         {InstructionSet::avx512, "binary_embedding"},
                                         {InstructionSet::avx512, "binary_matmul"},
                                         {InstructionSet::avx512, "binary_weight_linear"},
                                         {InstructionSet::avx512, "bitpack"},
                                         {InstructionSet::avx512, "decode_attention"},
                                         {InstructionSet::avx512, "e8m0_cast"},
                                         {InstructionSet::avx512, "e8m0_uncast"},
                                         {InstructionSet::avx512, "fp4_activations"},
                                         {InstructionSet::avx512, "fp4_cast"},
                                         {InstructionSet::avx512, "fp4_fp4_linear"},
                                         {InstructionSet::avx512, "fp4_linear"},
                                         {InstructionSet::avx512, "fp4_uncast"},
                                         {InstructionSet::avx512, "int8_quantize"},
                                         {InstructionSet::avx512, "layer_norm"},
                                         {InstructionSet::avx512, "mxfp4_dequantize"},
                                         {InstructionSet::avx512, "mxfp4_quantize"},
                                         {InstructionSet::avx512, "prompt_attention"},
                                         {InstructionSet::avx512, "salient_linear"},
                                         {InstructionSet::avx512, "zoned_linear"}};

}  // namespace bitmill
