// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace dmole::cpu {

// x [..., features] times weight [outputs, features] of any strides, plus bias [outputs]; float sums, one rounding, in
// x's dtype. A float weight meets bfloat16 rows rounded to bfloat16, as autocast would round it.
at::Tensor frozen_linear_op(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

}  // namespace dmole::cpu
