// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace dmole::cpu {

// x [..., features] times weight [outputs, features] of any strides, plus bias [outputs]; float sums, one rounding, in
// x's dtype. With bfloat16 rows a float weight is rounded to bfloat16, as autocast rounds it.
at::Tensor frozen_linear_op(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

}  // namespace dmole::cpu
