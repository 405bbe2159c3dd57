// SPDX-License-Identifier: Apache-2.0
// The arguments of a multi-expert LoRA kernel: pointers, sizes and threads, no torch. Mathematics and shape letters:
// dmole_kernels/_multi_lora.py.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "row_map.h"

namespace dmole::cpu {

// A (columns = in_features) or B (columns = out_features): value(j, c) = data[j * rank_stride + c * column_stride].
struct Weight {
  const void* data;
  bool is_float;  // else of the working type
  int64_t rank_stride, column_stride;
};

struct LoraExpert {
  int64_t rank;
  int64_t first;  // its first column of S
  float scale;
  Weight a, b;
  bool trainable;
  int64_t first_trainable;  // its first row of dA and dB
};

struct LoraCall {
  int64_t rows, features, outputs, ranks;
  int64_t gates;        // each covers rows / gates rows
  const float* factor;  // [gates, experts]: gate * scale
  const LoraExpert* experts;
  RowMap map;         // the pairs of row and expert whose gate is not zero
  bool every_column;  // S (forward) and P (backward) of all rows and experts, for the gate's gradient
  bool dropout;
  bool per_expert;
  double dropout_probability;  // of zeroing an element
  uint64_t seed;
  ParallelFor parallel;
  int threads;
};

// x, base, y and s have the working type; rows x_stride (base_stride) elements apart, y and s without gaps. Without
// every_column S is zero where the gate is.
struct LoraForward : LoraCall {
  const void* x;
  int64_t x_stride;
  const void* base;  // or null
  int64_t base_stride;
  void* y;
  void* s;
};

// A null output is not computed. x is read only for da, s for db and dgate.
struct LoraBackward : LoraCall {
  const void* grad;
  int64_t grad_stride;
  const void* x;
  int64_t x_stride;
  const void* s;
  void* dx;      // [rows, features]
  void* da;      // [trainable ranks, features]
  void* db;      // [trainable ranks, outputs]
  float* dgate;  // [gates, experts]; needs every_column
  int64_t trainable_ranks;
};

}  // namespace dmole::cpu
