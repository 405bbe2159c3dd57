// SPDX-License-Identifier: Apache-2.0
// The product with a frozen weight. Few rows: the weight is read once, a few of its outputs at a time, and multiplied
// with all rows. Many rows: blocks of gemm.h. The form depends on the number of rows and the layer alone, so within a
// form the result of a row does not depend on the other rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../bfloat16.h"
#include "../frozen_linear.h"
#include "../multi_lora.h"
#include "../scratch.h"
#include "gemm.h"
#include "lora_weights.h"
#include "packing.h"
#include "shrink.h"

namespace dmole::cpu::DMOLE_ISA {

constexpr int64_t kFewOutputs = 8;                   // their weights stay in the second-level cache for all rows
constexpr int64_t kOutputBlock = 16 * kTileColumns;  // columns of a tile of many rows

template <class T>
void few_rows_product(const FrozenLinearCall& call) {
  using Packing = typename PackingOf<T, T>::type;
  const Matrix<T> x{static_cast<const T*>(call.x), call.x_stride};
  std::vector<int32_t> row(call.rows);
  for (int64_t n = 0; n < call.rows; ++n) row[n] = static_cast<int32_t>(n);
  const int64_t groups = (call.outputs + kFewOutputs - 1) / kFewOutputs;
  const int64_t stride = packed_stride(call.features);
  call.parallel(groups, 8, [&](int64_t begin, int64_t end) {
    float* const sums = scratch(Scratch::lora_tile, call.rows * kFewOutputs);
    T* const packed = reinterpret_cast<T*>(scratch(Scratch::lora_weights, kFewOutputs * stride));
    for (int64_t p = begin * kFewOutputs; p < std::min(call.outputs, end * kFewOutputs); p += kFewOutputs) {
      const int64_t count = std::min(kFewOutputs, call.outputs - p);
      Weight weight = call.weight;
      weight.data = static_cast<const char*>(weight.data) + p * weight.rank_stride * (weight.is_float ? 4 : sizeof(T));
      WeightRows<T> rows{static_cast<const T*>(weight.data), weight.rank_stride};
      if (!readable_in_place<T>(weight)) {
        pack_weight_rows(weight, count, 0, call.features, packed, stride);
        rows = {packed, stride};
      }
      const int64_t next = rows.rows == packed ? 0 : kFewOutputs * rows.stride;
      shrink<T, Packing>({x, row.data(), {}, 0, rows, count, call.features, sums, next}, call.rows);
      for (int64_t n = 0; n < call.rows; ++n) {
        T* const y = static_cast<T*>(call.y) + n * call.outputs + p;
        for (int64_t i = 0; i < count; ++i) {
          y[i] = from_float<T>(sums[n * count + i] + (call.bias == nullptr ? 0.0f : call.bias[p + i]));
        }
      }
    }
  });
}

// Rows [n, n + rows) of y, columns [p, p + columns), through `sums` where y is not float.
template <class T>
void output_block(const FrozenLinearCall& call, int64_t n, int64_t rows, int64_t p, int64_t columns) {
  T* const y = static_cast<T*>(call.y) + n * call.outputs + p;
  float* sums;
  int64_t stride;
  if constexpr (std::is_same_v<T, float>) {
    sums = y;
    stride = call.outputs;
  } else {
    sums = scratch(Scratch::lora_tile, kBlockRows * kOutputBlock);
    stride = kOutputBlock;
  }
  for (int64_t i = 0; i < rows && call.bias != nullptr; ++i) std::copy_n(call.bias + p, columns, sums + i * stride);
  gemm<T, T>(rows, columns, call.features, static_cast<const T*>(call.x) + n * call.x_stride, call.x_stride, 1,
             static_cast<const T*>(call.weight.data) + p * call.weight.rank_stride, call.weight.column_stride,
             call.weight.rank_stride, sums, stride, call.bias != nullptr);
  if constexpr (!std::is_same_v<T, float>) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int count = static_cast<int>(std::min<int64_t>(kLanes, columns - c));
        store_some(y + i * call.outputs + c, load_some(sums + i * stride + c, count), count);
      }
    }
  }
}

template <class T>
void frozen_linear(const FrozenLinearCall& call) {
  const bool as_it_is = call.weight.column_stride == 1 || call.weight.is_float != std::is_same_v<T, float>;
  if (as_it_is && call.rows <= few_rows(call.features)) return few_rows_product<T>(call);
  const int64_t column_blocks = (call.outputs + kOutputBlock - 1) / kOutputBlock;
  const int64_t row_blocks = (call.rows + kBlockRows - 1) / kBlockRows;
  call.parallel(row_blocks * column_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t n = block / column_blocks * kBlockRows, p = block % column_blocks * kOutputBlock;
      output_block<T>(call, n, std::min(kBlockRows, call.rows - n), p, std::min(kOutputBlock, call.outputs - p));
    }
  });
}

}  // namespace dmole::cpu::DMOLE_ISA
