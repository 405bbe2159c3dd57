// SPDX-License-Identifier: Apache-2.0
// Which rows each expert serves, found on the device without waiting for it: the words of csrc/cpu/plan.h, the same
// layout, and which experts each tile of 32 rows needs.
#pragma once

#include <cstdint>

namespace dmole::cuda {

constexpr int kTileRows = 32;

inline int64_t plan_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t plan_needed_words(int64_t experts) { return (experts + 31) / 32; }
// Room for the largest plan; how much of it is used stands in the third word.
inline int64_t plan_capacity(int64_t rows, int64_t experts) { return 3 + experts + 1 + 2 * rows * experts; }

// Everything is on the device.
struct PlanCall {
  const float* gate;  // [gates, experts], each covers rows / gates rows
  int32_t* words;     // [plan_capacity]: {rows, experts, slots}, start, row, flags
  uint32_t* needed;   // [tiles, plan_needed_words]: bit e of a tile's bits: one of its rows needs expert e
  int32_t* counts;    // [experts, tiles], work memory
  int64_t rows, experts, gates;
};

}  // namespace dmole::cuda

// Three launches on `stream` (a cudaStream_t), one where there are no rows. Returns a cudaError_t: allocates nothing,
// waits for nothing, and may be captured in a CUDA graph.
extern "C" int dmole_cuda_plan(const dmole::cuda::PlanCall* call, void* stream);
