// SPDX-License-Identifier: Apache-2.0
#include "row_map_op.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dmole::cpu {

namespace {

at::Tensor table_of(const at::Tensor& gate, int64_t rows) {
  TORCH_CHECK_VALUE(gate.dim() == 2 && gate.device().is_cpu() &&
                        (gate.size(0) == 0 ? rows == 0 : rows >= 0 && rows % gate.size(0) == 0),
                    "row_map: gate has shape ", gate.sizes(), " on ", gate.device(), " for ", rows,
                    " rows; expected [gates, experts] on the CPU with gates a divisor of rows. "
                    "Give each sample or each row a gate.");
  const std::vector<int32_t> numbers = row_map_table_of(gate_values(gate), rows);
  at::Tensor table = at::empty({static_cast<int64_t>(numbers.size())}, at::TensorOptions().dtype(at::kInt));
  std::copy(numbers.begin(), numbers.end(), table.data_ptr<int32_t>());
  return table;
}

}  // namespace

at::Tensor gate_values(const at::Tensor& gate) {
  return gate.to(gate.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

std::vector<int32_t> row_map_table_of(const at::Tensor& values, int64_t rows) {
  const int64_t gates = values.size(0), experts = values.size(1);
  if (values.scalar_type() == at::kDouble) return row_map_table(values.data_ptr<double>(), gates, experts, rows);
  return row_map_table(values.data_ptr<float>(), gates, experts, rows);
}

GateRows::GateRows(const at::Tensor& gate, int64_t rows)
    : table(table_of(gate, rows)), map(read_row_map(table.data_ptr<int32_t>(), table.numel(), rows, gate.size(1))) {}

std::vector<int32_t> GateRows::rows_of(int64_t expert) const {
  if (expert < 0 || expert >= map.experts) {
    throw std::out_of_range("expert is " + std::to_string(expert) + "; expected a column of the gate, 0 to " +
                            std::to_string(map.experts - 1) + ". Use the number of the column.");
  }
  return {map.row + map.start[expert], map.row + map.start[expert + 1]};
}

std::vector<int64_t> GateRows::experts_of(int64_t begin, int64_t end) const {
  std::vector<int64_t> experts;
  for (int64_t e = 0; e < map.experts; ++e) {
    const int32_t* last = map.row + map.start[e + 1];
    const int32_t* found = std::lower_bound(map.row + map.start[e], last, begin);
    if (found != last && *found < end) experts.push_back(e);
  }
  return experts;
}

}  // namespace dmole::cpu
