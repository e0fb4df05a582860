// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launchers.h"

namespace bitmill::cuda {

// For checked params with m, n > 0, no groups and no zeros in the weight, on compute capability 8 or 9.
Status launch_binary_matmul_mma(const BinaryMatmulParams& params, Stream stream);

}  // namespace bitmill::cuda
