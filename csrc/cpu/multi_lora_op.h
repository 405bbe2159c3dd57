// SPDX-License-Identifier: Apache-2.0
// The tensor ops of multi_lora: signatures as dmole_kernels/reference.py, checks arguments and calls the kernels.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dmole::cpu {

// y in base's shape (x's leading dimensions without one) and S [rows, ranks], both in base's dtype (x's). With
// `every_column` S is computed for all pairs, which the gate's gradient needs; else it is zero where the gate is.
std::tuple<at::Tensor, at::Tensor> multi_lora_forward_op(const at::Tensor& x, const std::optional<at::Tensor>& base,
                                                         at::TensorList lora_a, at::TensorList lora_b,
                                                         const at::Tensor& gate, at::ArrayRef<double> scale,
                                                         double dropout, bool per_expert,
                                                         const std::optional<at::Tensor>& seed, bool every_column,
                                                         const std::optional<at::Tensor>& row_map);

// dx, dA of the trainable experts, their dB^T, dgate; those that are not requested have no elements.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> multi_lora_backward_op(
    const at::Tensor& grad, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& s,
    at::TensorList lora_a, at::TensorList lora_b, const at::Tensor& gate, at::ArrayRef<double> scale, double dropout,
    bool per_expert, const std::optional<at::Tensor>& seed, bool need_x, bool need_gate,
    const c10::List<bool>& trainable, const std::optional<at::Tensor>& row_map);

}  // namespace dmole::cpu
