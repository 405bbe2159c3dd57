// SPDX-License-Identifier: Apache-2.0
#include "row_map.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace dmole::cpu {

namespace {

constexpr int64_t kHeader = 3;

}  // namespace

template <class G>
std::vector<int32_t> row_map_table(const G* gate, int64_t gates, int64_t experts, int64_t rows) {
  const int64_t rows_per_gate = gates == 0 ? 0 : rows / gates;
  std::vector<int64_t> ends(experts, 0);
  for (int64_t g = 0; g < gates; ++g) {
    for (int64_t e = 0; e < experts; ++e) {
      if (gate[g * experts + e] != G{0}) ends[e] += rows_per_gate;
    }
  }
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  const int64_t pairs = experts == 0 ? 0 : ends.back();
  if (std::max(rows, pairs) > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("the gate joins " + std::to_string(rows) + " rows and " + std::to_string(experts) +
                                " experts in " + std::to_string(pairs) +
                                " pairs; expected fewer than 2^31 of each. Use smaller batches.");
  }
  std::vector<int32_t> start(1, 0);
  start.insert(start.end(), ends.begin(), ends.end());
  std::vector<int32_t> table(kHeader + experts + 1 + 2 * pairs);
  table[0] = static_cast<int32_t>(rows);
  table[1] = static_cast<int32_t>(experts);
  table[2] = static_cast<int32_t>(pairs);
  std::copy(start.begin(), start.end(), table.begin() + kHeader);
  int32_t* row = table.data() + kHeader + experts + 1;
  int32_t* flags = row + pairs;
  std::vector<int32_t> next(start.begin(), start.end() - 1);
  for (int64_t g = 0; g < gates; ++g) {
    const G* values = gate + g * experts;
    int64_t first = experts, last = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (values[e] == G{0}) continue;
      first = std::min(first, e);
      last = e;
    }
    for (int64_t e = first; e <= last; ++e) {
      if (values[e] == G{0}) continue;
      const int32_t flag = (e == first ? kFirst : 0) | (e == last ? kLast : 0);
      for (int64_t i = 0; i < rows_per_gate; ++i) {
        row[next[e]] = static_cast<int32_t>(g * rows_per_gate + i);
        flags[next[e]++] = flag;
      }
    }
  }
  return table;
}

template std::vector<int32_t> row_map_table<float>(const float*, int64_t, int64_t, int64_t);
template std::vector<int32_t> row_map_table<double>(const double*, int64_t, int64_t, int64_t);

RowMap read_row_map(const int32_t* table, int64_t count, int64_t rows, int64_t experts) {
  const bool whole = count >= kHeader && count == kHeader + table[1] + 1 + 2 * int64_t{table[2]};
  if (!whole || table[0] != rows || table[1] != experts) {
    throw std::invalid_argument("row_map is for " + std::to_string(whole ? table[0] : -1) + " rows and " +
                                std::to_string(whole ? table[1] : -1) + " experts; expected " + std::to_string(rows) +
                                " and " + std::to_string(experts) + ". Build it from this call's gate.");
  }
  RowMap map;
  map.rows = rows;
  map.experts = experts;
  map.pairs = table[2];
  map.start = table + kHeader;
  map.row = map.start + experts + 1;
  map.flags = map.row + map.pairs;
  return map;
}

}  // namespace dmole::cpu
