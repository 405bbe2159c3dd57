// SPDX-License-Identifier: Apache-2.0
// The rows that use each expert, computed on the device without synchronisation: the table of csrc/cpu/row_map.h, and
// the experts that each tile of 32 rows needs.
#pragma once

#include <cstdint>

namespace dmole::cuda {

constexpr int kTileRows = 32;

inline int64_t row_map_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t row_map_needed_words(int64_t experts) { return (experts + 31) / 32; }
// Size of the largest table; its third number is the number of pairs in use.
inline int64_t row_map_capacity(int64_t rows, int64_t experts) { return 3 + experts + 1 + 2 * rows * experts; }

// Everything is on the device.
struct RowMapCall {
  const float* gate;  // [gates, experts], each covers rows / gates rows
  int32_t* table;     // [row_map_capacity]: {rows, experts, pairs}, start, row, flags
  uint32_t* needed;   // [tiles, row_map_needed_words]: bit e of a tile's bits: one of its rows needs expert e
  int32_t* counts;    // [experts, tiles], work memory
  int64_t rows, experts, gates;
};

}  // namespace dmole::cuda

// Three launches on `stream` (a cudaStream_t), one where there are no rows. Returns a cudaError_t. Neither allocates
// nor synchronises; may be captured in a CUDA graph.
extern "C" int dmole_cuda_row_map(const dmole::cuda::RowMapCall* call, void* stream);
