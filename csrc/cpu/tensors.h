// SPDX-License-Identifier: Apache-2.0
// Converts torch's tensors to the kernels' pointers: for *_op.cpp only.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>

#include "bfloat16.h"
#include "parallel.h"

namespace dmole::cpu {

template <class T>
constexpr at::ScalarType kScalarType = std::is_same_v<T, float> ? at::kFloat : at::kBFloat16;

// A tensor's elements as the kernels' type.
template <class T>
T* elements(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// [rows, features] whose rows are contiguous; rows may be any distance apart. Copies only tensors without such a view.
inline at::Tensor matrix(const at::Tensor& tensor, at::ScalarType dtype) {
  at::Tensor rows = tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
  if (rows.dim() != 2) rows = rows.reshape({rows.numel() / std::max<int64_t>(1, rows.size(-1)), rows.size(-1)});
  return rows.size(1) > 1 && rows.stride(1) != 1 ? rows.contiguous() : rows;
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, op, ": ", name, " is ",
                    tensor.scalar_type(),
                    "; the cpu backend expects float32 or bfloat16. Cast it or pass backend='reference'.");
}

// torch's thread pool. A range of one grain or less runs on the calling thread at no cost.
inline void torch_parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace dmole::cpu
