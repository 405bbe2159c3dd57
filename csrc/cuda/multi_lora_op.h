// SPDX-License-Identifier: Apache-2.0
// The tensor ops of the decode path and of the row map: checks arguments and calls the launchers. In a CUDA build only.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dmole::cuda {

// y [rows, outputs] and S [rows, ranks] in x's dtype; S is zero where the gate is. `columns` and `spans` are the tables
// of the packed columns; `expert_dtype` is the dtype of the experts (multi_lora.h).
std::tuple<at::Tensor, at::Tensor> decode_op(const at::Tensor& x, const std::optional<at::Tensor>& base,
                                             const at::Tensor& gate, const at::Tensor& columns, const at::Tensor& spans,
                                             int64_t outputs, at::ScalarType expert_dtype, bool a_aligned,
                                             bool b_aligned);

// The table of a row map, with room for the largest one, and the experts that each tile of 32 rows needs (row_map.h).
std::tuple<at::Tensor, at::Tensor> row_map_op(const at::Tensor& gate, int64_t rows);

}  // namespace dmole::cuda
