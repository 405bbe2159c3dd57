// SPDX-License-Identifier: Apache-2.0
#include "gemm_op.h"

#include <ATen/ops/empty.h>

#include "gemm.h"
#include "tensors.h"

namespace dmole::cpu {

namespace {

template <class TA, class TB>
void run(const at::Tensor& a, const at::Tensor& b, at::Tensor& c) {
  gemm(a.size(0), b.size(1), a.size(1), elements<TA>(a), a.stride(0), a.stride(1), elements<TB>(b), b.stride(0),
       b.stride(1), c.data_ptr<float>(), c.stride(0), false);
}

}  // namespace

at::Tensor gemm_op(const at::Tensor& a, const at::Tensor& b) {
  check_dtype("gemm", "a", a);
  check_dtype("gemm", "b", b);
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "gemm: a has shape ", a.sizes(), " and b ",
                    b.sizes(), "; expected [M, K] and [K, N]. Transpose one of them.");
  at::Tensor c = at::empty({a.size(0), b.size(1)}, a.options().dtype(at::kFloat));
  const bool float_a = a.scalar_type() == at::kFloat, float_b = b.scalar_type() == at::kFloat;
  if (float_a && float_b) run<float, float>(a, b, c);
  if (float_a && !float_b) run<float, bfloat16>(a, b, c);
  if (!float_a && float_b) run<bfloat16, float>(a, b, c);
  if (!float_a && !float_b) run<bfloat16, bfloat16>(a, b, c);
  return c;
}

}  // namespace dmole::cpu
