// SPDX-License-Identifier: Apache-2.0
// Which rows each expert serves: the rows where its gate is not zero, found once and shared by all layers of a step.
//
// A kernel walks an expert's own rows, tile by tile, so its cost follows the number of (row, expert) pairs in use and
// not the number of experts. Example, four rows of two samples, gate [[1, 0], [1, 1]]:
//
//     start = [0, 4, 6]    row = [0, 1, 2, 3,  2, 3]    flags = [first | last, first | last, first, first,  last, last]
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace dmole::cpu {

constexpr int32_t kFirst = 1;  // the row's first expert in use: nothing to add to
constexpr int32_t kLast = 2;   // its last one: the sum is whole

// Slots start[e] <= slot < start[e + 1] are expert e's pairs, by row.
struct PlanView {
  int64_t rows = 0, experts = 0, slots = 0;
  const int32_t* start = nullptr;  // [experts + 1]
  const int32_t* row = nullptr;    // [slots]
  const int32_t* flags = nullptr;  // [slots]
};

// Numbers of a plan in one piece: {rows, experts, slots}, start, row, flags. G is float or double.
template <class G>
std::vector<int32_t> plan_words(const G* gate, int64_t gates, int64_t experts, int64_t rows);

// Throws std::invalid_argument when the words are no plan of this many rows and experts.
PlanView view_plan(const int32_t* words, int64_t count, int64_t rows, int64_t experts);

}  // namespace dmole::cpu
