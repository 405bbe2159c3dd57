// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace dmole::cpu {

// x and grad are both float32 or both bfloat16; two different dtypes are converted to float32.

// x [B, T, in_features], grad [B, T, out_features] -> ||grad[b]^T x[b]||_F^2 in float32, [B].
// method "direct", "ghost" or "auto", the cheaper one for each sample without its padding.
at::Tensor squared_norm_op(const at::Tensor& x, const at::Tensor& grad, const std::string& method);

// buffer [out_features, in_features] += grad^T x, x and grad [N, ...]; a buffer of another dtype than float32 is
// rounded once.
void accumulate_gradient_op(at::Tensor& buffer, const at::Tensor& x, const at::Tensor& grad);

// sketch [k, l] += (grad left)^T (x right), likewise.
void accumulate_sketch_op(at::Tensor& sketch, const at::Tensor& x, const at::Tensor& grad, const at::Tensor& left,
                          const at::Tensor& right);

// The method of "auto" for a sample of this shape: "direct" or "ghost".
std::string grad_norm_method(int64_t tokens, int64_t in_features, int64_t out_features);

}  // namespace dmole::cpu
