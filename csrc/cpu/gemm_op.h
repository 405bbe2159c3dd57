// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace dmole::cpu {

// a [M, K] times b [K, N] in float, any strides: gemm.h as a tensor op, for the tests.
at::Tensor gemm_op(const at::Tensor& a, const at::Tensor& b);

}  // namespace dmole::cpu
