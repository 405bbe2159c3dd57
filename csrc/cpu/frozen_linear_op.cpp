// SPDX-License-Identifier: Apache-2.0
#include "frozen_linear_op.h"

#include <ATen/ops/empty.h>

#include <vector>

#include "kernels.h"
#include "frozen_linear.h"
#include "tensors.h"

namespace dmole::cpu {

at::Tensor frozen_linear_op(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_dtype("frozen_linear", "x", x);
  check_dtype("frozen_linear", "weight", weight);
  TORCH_CHECK_VALUE(x.dim() > 0 && weight.dim() == 2 && weight.size(1) == x.size(-1) &&
                        (!bias.has_value() || bias->sizes() == at::IntArrayRef({weight.size(0)})),
                    "frozen_linear: x has shape ", x.sizes(), ", weight ", weight.sizes(), ", bias ",
                    bias.has_value() ? bias->sizes() : at::IntArrayRef(),
                    "; expected [..., features], [outputs, features] and [outputs]. Transpose or flatten one of them.");
  const at::ScalarType dtype = x.scalar_type();
  FrozenLinearCall call{};
  call.features = x.size(-1);
  call.outputs = weight.size(0);
  const at::Tensor x_ND = matrix(x, dtype);
  call.rows = x_ND.size(0);
  call.x = x_ND.data_ptr();
  call.x_stride = x_ND.stride(0);
  // The weight is converted for many rows only; for few the kernel reads it unconverted.
  const bool readable = weight.scalar_type() == at::kFloat && call.rows <= few_rows(call.features);
  const at::Tensor w = weight.scalar_type() == dtype || readable ? weight : weight.to(dtype);
  call.weight = {w.data_ptr(), w.scalar_type() == at::kFloat, w.stride(0), w.stride(1)};
  at::Tensor bias_P;
  if (bias.has_value()) {
    bias_P = bias->to(at::kFloat).contiguous();
    call.bias = bias_P.data_ptr<float>();
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = call.outputs;
  const at::Tensor y = at::empty(shape, x.options());
  call.y = y.data_ptr();
  call.parallel = &torch_parallel_for;
  kernels().frozen_linear[dtype == at::kBFloat16](call);
  return y;
}

}  // namespace dmole::cpu
