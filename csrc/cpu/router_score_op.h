// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace dmole::cpu {

// Reconstruction error [N, tasks] of features [N, width] in their dtype, float32 or bfloat16, also the dtype
// of the stacked autoencoders; see router_score.h.
at::Tensor router_score_op(const at::Tensor& features, const at::Tensor& encoder_weight, const at::Tensor& encoder_bias,
                           const at::Tensor& decoder_weight, const at::Tensor& decoder_bias, bool sigmoid);

// Gate [N, tasks] of 0 and 1 in error's dtype; compares in float32.
at::Tensor router_select_op(const at::Tensor& error, const at::Tensor& threshold, int64_t top_k);

}  // namespace dmole::cpu
