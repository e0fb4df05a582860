// SPDX-License-Identifier: Apache-2.0
// Layer normalisation as the torch that is loaded computes it.
#pragma once

#include <span>

#include "row_steps.h"

namespace bitmill {

// Runs the steps, with normalisations that have the bits of aten::native_layer_norm: ours where it has them, which is
// tried once, and otherwise torch's, between the steps.
void run_with_layer_norm(const char* op, std::span<const RowStep> steps);

}  // namespace bitmill
