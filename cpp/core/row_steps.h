// SPDX-License-Identifier: Apache-2.0
// Steps of a block that treat every row by itself: packing, products, normalisation, embedding. Where there are many
// rows, each thread takes some of them through all steps, while they are in its nearest caches, and no thread waits in
// between.
#pragma once

#include <span>
#include <variant>

#include "add_rows.h"
#include "binary_embedding.h"
#include "binary_matmul.h"
#include "bitpack.h"
#include "layer_norm.h"

namespace bitmill {

using RowStep = std::variant<BitpackParams, BinaryMatmulParams, LayerNormParams, BinaryEmbeddingParams, AddRowsParams>;

// One after the other; a step may read what one before it writes. All have the same m and the same parallel_for.
Status row_steps(std::span<const RowStep> steps);

}  // namespace bitmill
