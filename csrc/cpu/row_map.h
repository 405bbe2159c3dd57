// SPDX-License-Identifier: Apache-2.0
// The rows that use each expert, those whose gate is not zero: computed once and used by all layers of a step.
//
// A kernel processes the rows of each expert, tile by tile, so its cost is proportional to the number of (row, expert)
// pairs in use, not to the number of experts. Example, four rows of two samples, gate [[1, 0], [1, 1]]:
//
//     start = [0, 4, 6]    row = [0, 1, 2, 3,  2, 3]    flags = [first | last, first | last, first, first,  last, last]
#pragma once

#include <cstdint>
#include <vector>

namespace dmole::cpu {

constexpr int32_t kFirst = 1;  // the row's first expert in use: starts the sum
constexpr int32_t kLast = 2;   // its last one: the sum is complete

// Pairs start[e] <= pair < start[e + 1] belong to expert e, in the order of rows.
struct RowMap {
  int64_t rows = 0, experts = 0, pairs = 0;
  const int32_t* start = nullptr;  // [experts + 1]
  const int32_t* row = nullptr;    // [pairs]
  const int32_t* flags = nullptr;  // [pairs]
};

// The table of a row map, one list of int32: {rows, experts, pairs}, start, row, flags. G is float or double.
// Throws std::invalid_argument for 2^31 rows or pairs.
template <class G>
std::vector<int32_t> row_map_table(const G* gate, int64_t gates, int64_t experts, int64_t rows);

// Views a table of `count` numbers. Throws std::invalid_argument when it is not one of this many rows and experts.
RowMap read_row_map(const int32_t* table, int64_t count, int64_t rows, int64_t experts);

}  // namespace dmole::cpu
