// SPDX-License-Identifier: Apache-2.0
#include "grad_norm_op.h"

#include <ATen/ops/empty.h>

#include "grad_norm.h"
#include "tensors.h"

namespace dmole::cpu {

namespace {

NormMethod parsed_method(const std::string& name) {
  if (name == "auto") return NormMethod::automatic;
  if (name == "direct") return NormMethod::direct;
  TORCH_CHECK_VALUE(name == "ghost", "method is '", name, "'; expected 'auto', 'direct' or 'ghost'. Use 'auto'.");
  return NormMethod::ghost;
}

// x and grad as the kernels read them: one dtype (float32 where they differ), contiguous rows.
struct Pair {
  at::Tensor x, grad;

  Pair(const char* op, const at::Tensor& x_given, const at::Tensor& grad_given) : x(x_given), grad(grad_given) {
    if (x.scalar_type() != grad.scalar_type()) {
      x = x.to(at::kFloat);
      grad = grad.to(at::kFloat);
    }
    check_dtype(op, "x", x);
    TORCH_CHECK_VALUE(x.dim() == grad.dim() && x.sizes().slice(0, x.dim() - 1) == grad.sizes().slice(0, x.dim() - 1),
                      op, ": x has shape ", x.sizes(), " and grad ", grad.sizes(),
                      "; expected the same but for the last dimension. Reshape them.");
    x = with_rows(x);
    grad = with_rows(grad);
  }

  bool is_float() const { return x.scalar_type() == at::kFloat; }

  static at::Tensor with_rows(const at::Tensor& tensor) {
    return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
  }
};

template <class T>
Rows<T> rows_of(const at::Tensor& tensor) {
  return {elements<T>(tensor), tensor.size(-1), tensor.stride(-2), tensor.dim() == 3 ? tensor.stride(0) : 0};
}

// The tensor in float32, contiguous; no copy where it already is.
at::Tensor float_contiguous(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": ", name, " has shape ", tensor.sizes(), "; expected ", expected,
                    ". Allocate it with that shape.");
  return tensor.to(at::kFloat).contiguous();
}

}  // namespace

at::Tensor squared_norm_op(const at::Tensor& x, const at::Tensor& grad, const std::string& method) {
  const NormMethod parsed = parsed_method(method);
  TORCH_CHECK_VALUE(x.dim() == 3, "grad_norm_per_sample: x has shape ", x.sizes(),
                    "; expected [samples, tokens, features]. Reshape it.");
  const Pair pair("grad_norm_per_sample", x, grad);
  at::Tensor squares = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    squared_norms<T>(torch_parallel_for, parsed, x.size(0), x.size(1), rows_of<T>(pair.x), rows_of<T>(pair.grad),
                     squares.data_ptr<float>());
  };
  if (pair.is_float()) {
    run(float{});
  } else {
    run(bfloat16{});
  }
  return squares;
}

void accumulate_gradient_op(at::Tensor& buffer, const at::Tensor& x, const at::Tensor& grad) {
  TORCH_CHECK_VALUE(x.dim() == 2, "accumulate_gradient: x has shape ", x.sizes(),
                    "; expected [rows, features]. Reshape it.");
  const Pair pair("accumulate_gradient", x, grad);
  const at::Tensor target = float_contiguous("accumulate_gradient", "buffer", buffer, {grad.size(1), x.size(1)});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    accumulate_gradient<T>(torch_parallel_for, x.size(0), rows_of<T>(pair.x), rows_of<T>(pair.grad),
                           target.data_ptr<float>());
  };
  if (pair.is_float()) {
    run(float{});
  } else {
    run(bfloat16{});
  }
  if (!target.is_same(buffer)) buffer.copy_(target);
}

void accumulate_sketch_op(at::Tensor& sketch, const at::Tensor& x, const at::Tensor& grad, const at::Tensor& left,
                          const at::Tensor& right) {
  TORCH_CHECK_VALUE(x.dim() == 2 && left.dim() == 2 && right.dim() == 2, "accumulate_sketch: x has shape ", x.sizes(),
                    ", left ", left.sizes(), ", right ", right.sizes(),
                    "; expected two dimensions each. Reshape them.");
  const Pair pair("accumulate_sketch", x, grad);
  const int64_t k = left.size(1), l = right.size(1);
  const at::Tensor left_PK = float_contiguous("accumulate_sketch", "left", left, {grad.size(1), k});
  const at::Tensor right_DL = float_contiguous("accumulate_sketch", "right", right, {x.size(1), l});
  const at::Tensor target = float_contiguous("accumulate_sketch", "sketch", sketch, {k, l});
  const at::Tensor shrunk_grad = at::empty({x.size(0), k}, target.options());
  const at::Tensor shrunk_x = at::empty({x.size(0), l}, target.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    accumulate_sketch<T>(torch_parallel_for, x.size(0), rows_of<T>(pair.x), rows_of<T>(pair.grad),
                         left_PK.data_ptr<float>(), k, right_DL.data_ptr<float>(), l, shrunk_grad.data_ptr<float>(),
                         shrunk_x.data_ptr<float>(), target.data_ptr<float>());
  };
  if (pair.is_float()) {
    run(float{});
  } else {
    run(bfloat16{});
  }
  if (!target.is_same(sketch)) sketch.copy_(target);
}

std::string grad_norm_method(int64_t tokens, int64_t in_features, int64_t out_features) {
  return cheaper_method(tokens, in_features, out_features) == NormMethod::ghost ? "ghost" : "direct";
}

}  // namespace dmole::cpu
