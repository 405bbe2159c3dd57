// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace dmole::cpu {

// Maxima [B, D] of hidden [B, T, D] (float32 or bfloat16) over the tokens with mask [B, T] true, and the first token of
// each maximum. A sample without a token gets -infinity and token 0; a NaN is larger than any number.
std::tuple<at::Tensor, at::Tensor> masked_max_pool_op(const at::Tensor& hidden, const at::Tensor& mask);

}  // namespace dmole::cpu
