// SPDX-License-Identifier: Apache-2.0
// The work of the gradient norms, the router and the pool besides products (gemm.h): passes over a tile while it is in
// cache. One table per instruction set, kernels().tile_math.
#pragma once

#include <cstdint>

#include "bfloat16.h"

namespace dmole::cpu {

// Tiles are float, `stride` elements from row to row. [2] is [float, bfloat16], the type behind the void pointers.
struct TileMath {
  // sum(tile^2) and sum(a * b), lane by lane in float along a row, rows in double.
  double (*sum_of_squares)(const float* tile, int64_t rows, int64_t columns, int64_t stride);
  double (*sum_of_products)(const float* a, const float* b, int64_t rows, int64_t columns, int64_t stride);

  // to(r, c) = max(sums(r, c) + bias[r], 0)
  void (*bias_relu[2])(const float* sums, const void* bias, int64_t rows, int64_t columns, int64_t stride, void* to);

  // error[c] += sum_r (f(sums(r, c) + bias[r]) - target(r, c))^2, f sigmoid or identity.
  void (*squared_error[2])(const float* sums, const void* bias, const void* target, bool sigmoid, int64_t rows,
                           int64_t columns, int64_t stride, float* error);

  // values[c] = max over t with mask[t * mask_stride] not 0 of from[t * stride + c], token[c] the first t that reaches
  // it; a NaN is larger than any number. Without a token: -infinity and 0.
  void (*max_pool[2])(const void* from, const uint8_t* mask, int64_t mask_stride, int64_t tokens, int64_t columns,
                      int64_t stride, void* values, int64_t* token);
};

}  // namespace dmole::cpu
