// SPDX-License-Identifier: Apache-2.0
// The arguments of a product with a frozen weight: y(n, p) = sum_d x(n, d) W(p, d) + bias(p). No torch.
#pragma once

#include <cstdint>

#include "multi_lora.h"
#include "parallel.h"

namespace dmole::cpu {

// The maximum number of rows for which the weight is read once and in place: a form that ends in sums of lanes, which
// pays off with long sums.
inline int64_t few_rows(int64_t features) { return features >= 1024 ? 24 : 2; }

// x and y have the working type: rows of x x_stride elements apart, y without gaps. `weight` counts its outputs as
// ranks: value(p, d) = data[p * rank_stride + d * column_stride].
struct FrozenLinearCall {
  int64_t rows, features, outputs;
  const void* x;
  int64_t x_stride;
  Weight weight;
  const float* bias;  // or null
  void* y;
  ParallelFor parallel;
};

}  // namespace dmole::cpu
