// SPDX-License-Identifier: Apache-2.0
// The row map (row_map.h) of a gate in a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "row_map.h"

namespace dmole::cpu {

// The gate as the kernels multiply it: in its own dtype, float at least, contiguous.
at::Tensor gate_values(const at::Tensor& gate);

// row_map_table() of gate_values().
std::vector<int32_t> row_map_table_of(const at::Tensor& values, int64_t rows);

// dmole_kernels._C.RowMap in Python. `table` is the int32 tensor that the ops take.
struct GateRows {
  at::Tensor table;
  RowMap map;

  // Raises ValueError unless gate is [gates, experts] on the CPU with gates a divisor of rows.
  GateRows(const at::Tensor& gate, int64_t rows);

  // The rows whose gate for this expert is not zero. Raises IndexError for an expert without a column of the gate.
  std::vector<int32_t> rows_of(int64_t expert) const;

  // The experts that rows [begin, end) use.
  std::vector<int64_t> experts_of(int64_t begin, int64_t end) const;
};

}  // namespace dmole::cpu
