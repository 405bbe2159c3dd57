// SPDX-License-Identifier: Apache-2.0
// The forward pass of a decode step, 1 to 16 rows: pointers and sizes, no torch and no CUDA header. Mathematics and
// shape letters: dmole_kernels/_multi_lora.py.
#pragma once

#include <cstdint>

namespace dmole::cuda {

constexpr int kMostRows = 16;

enum ElementType : int32_t { kFloat = 0, kHalf = 1, kBFloat16 = 2 };

// Rows of the table of packed columns, which dmole_kernels/triton_backend/columns.py builds.
enum ColumnField : int32_t { kAddressA = 0, kAddressB = 1, kStepB = 2, kExpert = 3, kScale = 4 };

// Everything is on the device. x, base, y and s have `type`; all experts have `expert_type`: the same, or kFloat.
struct DecodeCall {
  const void* x;           // rows x_step elements apart
  const void* base;        // rows base_step elements apart; or null
  void* y;                 // [rows, outputs]
  void* s;                 // [rows, ranks]: zero where the gate is; the only work memory
  const float* gate;       // [gates, experts], each covers rows / gates rows
  const int64_t* columns;  // [fields, ranks]; the scale is the bits of a double
  const int32_t* spans;    // [experts, 2]: first column, rank
  int64_t x_step, base_step;
  int64_t rows, features, outputs, ranks, experts, gates;
  int32_t type, expert_type;
  int32_t a_aligned;  // every row of every A begins at a multiple of 16 bytes
  int32_t b_aligned;  // 16 bytes of every row of every B are whole neighbours, and begin at a multiple of 16 bytes
};

}  // namespace dmole::cuda

// Two launches on `stream` (a cudaStream_t), none where there is nothing to write. Returns a cudaError_t. Neither
// allocates nor synchronises; may be captured in a CUDA graph.
extern "C" int dmole_cuda_decode(const dmole::cuda::DecodeCall* call, void* stream);
