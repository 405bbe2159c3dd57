// SPDX-License-Identifier: Apache-2.0
#include "multi_lora_op.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "multi_lora.h"
#include "row_map.h"
#include "row_map_op.h"
#include "tensors.h"

namespace dmole::cpu {

namespace {

constexpr const char* kOp = "multi_lora";

// Tensors and lists that a call has pointers to.
struct CallStorage {
  std::vector<at::Tensor> weights;
  std::vector<LoraExpert> experts;
  std::vector<float> factor;
  at::Tensor row_map;
  std::vector<int32_t> row_map_table;
};

int64_t leading_rows(const at::Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

Weight weight_of(CallStorage& storage, const at::Tensor& tensor, at::ScalarType dtype, int64_t rank_dimension) {
  check_dtype(kOp, "an expert's weight", tensor);
  // A bfloat16 expert of a float32 model is converted to float32.
  const bool readable = tensor.scalar_type() == dtype || tensor.scalar_type() == at::kFloat;
  storage.weights.push_back(readable ? tensor : tensor.to(at::kFloat));
  const at::Tensor& weight = storage.weights.back();
  return {weight.data_ptr(), weight.scalar_type() == at::kFloat, weight.stride(rank_dimension),
          weight.stride(1 - rank_dimension)};
}

template <class G>
std::vector<float> factors(const at::Tensor& values, at::ArrayRef<double> scale) {
  const G* gate = values.data_ptr<G>();
  std::vector<float> factor;
  factor.reserve(values.numel());
  for (int64_t g = 0; g < values.size(0); ++g) {
    for (const double s : scale) factor.push_back(static_cast<float>(*gate++ * static_cast<G>(s)));
  }
  return factor;
}

void fill_call(LoraCall& call, CallStorage& storage, at::ScalarType dtype, at::TensorList lora_a, at::TensorList lora_b,
               const at::Tensor& gate, at::ArrayRef<double> scale, double dropout, bool per_expert,
               const std::optional<at::Tensor>& seed, bool every_column, const std::optional<at::Tensor>& row_map) {
  const auto experts = static_cast<int64_t>(lora_a.size());
  TORCH_CHECK_VALUE(experts > 0 && static_cast<int64_t>(lora_b.size()) == experts &&
                        static_cast<int64_t>(scale.size()) == experts && gate.dim() == 2 && gate.size(1) == experts,
                    kOp, ": got ", experts, " lora_a, ", lora_b.size(), " lora_b, ", scale.size(), " scales, gate ",
                    gate.sizes(), "; expected one of each per expert and gate [gates, experts].");
  TORCH_CHECK_VALUE(dropout >= 0.0 && dropout < 1.0, kOp, ": dropout is ", dropout, "; expected a chance in [0, 1).");
  call.gates = gate.size(0);
  TORCH_CHECK_VALUE(call.gates == 0 ? call.rows == 0 : call.rows % call.gates == 0, kOp, ": gate has ", call.gates,
                    " rows for ", call.rows, " rows of x; expected a divisor. Give each sample or each row a gate.");
  storage.weights.reserve(2 * experts);
  storage.experts.resize(experts);
  call.ranks = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const at::Tensor &a = lora_a[e], &b = lora_b[e];
    TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == call.features && b.size(0) == call.outputs &&
                          b.size(1) == a.size(0) && a.device().is_cpu() && b.device().is_cpu(),
                      kOp, ": expert ", e, " has lora_a ", a.sizes(), " and lora_b ", b.sizes(), "; expected [rank, ",
                      call.features, "] and [", call.outputs, ", rank] on the CPU.");
    LoraExpert& expert = storage.experts[e];
    expert.rank = a.size(0);
    expert.first = call.ranks;
    expert.scale = static_cast<float>(scale[e]);
    expert.a = weight_of(storage, a, dtype, 0);
    expert.b = weight_of(storage, b, dtype, 1);
    expert.trainable = false;
    expert.first_trainable = 0;
    call.ranks += expert.rank;
  }
  call.experts = storage.experts.data();
  const at::Tensor values = gate_values(gate);
  storage.factor = values.scalar_type() == at::kDouble ? factors<double>(values, scale) : factors<float>(values, scale);
  call.factor = storage.factor.data();
  call.every_column = every_column;
  if (row_map.has_value()) {
    storage.row_map = row_map->contiguous();
    TORCH_CHECK_VALUE(storage.row_map.scalar_type() == at::kInt, kOp, ": row_map is ", storage.row_map.scalar_type(),
                      "; expected int32. Build it with dmole_kernels.RowMap.");
    call.map = read_row_map(storage.row_map.data_ptr<int32_t>(), storage.row_map.numel(), call.rows, experts);
  } else {
    storage.row_map_table = row_map_table_of(values, call.rows);
    call.map = read_row_map(storage.row_map_table.data(), static_cast<int64_t>(storage.row_map_table.size()), call.rows,
                            experts);
  }
  call.dropout = seed.has_value() && dropout > 0.0;
  call.per_expert = per_expert;
  call.dropout_probability = dropout;
  call.seed = call.dropout ? static_cast<uint64_t>(seed->item<int64_t>()) : 0;
  call.parallel = &torch_parallel_for;
  call.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> multi_lora_forward_op(const at::Tensor& x, const std::optional<at::Tensor>& base,
                                                         at::TensorList lora_a, at::TensorList lora_b,
                                                         const at::Tensor& gate, at::ArrayRef<double> scale,
                                                         double dropout, bool per_expert,
                                                         const std::optional<at::Tensor>& seed, bool every_column,
                                                         const std::optional<at::Tensor>& row_map) {
  check_dtype(kOp, "x", base.has_value() ? *base : x);
  TORCH_CHECK_VALUE(x.dim() > 0 && !lora_b.empty(), kOp, ": got ", lora_b.size(), " experts for x ", x.sizes(),
                    "; expected at least one, and x [..., features].");
  const at::ScalarType dtype = base.has_value() ? base->scalar_type() : x.scalar_type();
  LoraForward call{};
  CallStorage storage;
  call.rows = leading_rows(x);
  call.features = x.size(-1);
  call.outputs = lora_b[0].size(0);
  fill_call(call, storage, dtype, lora_a, lora_b, gate, scale, dropout, per_expert, seed, every_column, row_map);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = call.outputs;
  const at::Tensor y = at::empty(shape, x.options().dtype(dtype));
  const at::Tensor s = at::empty({call.rows, call.ranks}, x.options().dtype(dtype));
  const at::Tensor x_ND = matrix(x, dtype);
  at::Tensor base_NP;
  call.x = x_ND.data_ptr();
  call.x_stride = x_ND.stride(0);
  call.base = nullptr;
  if (base.has_value()) {
    TORCH_CHECK_VALUE(base->sizes() == y.sizes(), kOp, ": base has shape ", base->sizes(), "; expected ", y.sizes(),
                      ". Pass the layer's output for this x.");
    base_NP = matrix(*base, dtype);
    call.base = base_NP.data_ptr();
    call.base_stride = base_NP.stride(0);
  }
  call.y = y.data_ptr();
  call.s = s.data_ptr();
  kernels().lora_forward[dtype == at::kBFloat16](call);
  return {y, s};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> multi_lora_backward_op(
    const at::Tensor& grad, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& s,
    at::TensorList lora_a, at::TensorList lora_b, const at::Tensor& gate, at::ArrayRef<double> scale, double dropout,
    bool per_expert, const std::optional<at::Tensor>& seed, bool need_x, bool need_gate,
    const c10::List<bool>& trainable, const std::optional<at::Tensor>& row_map) {
  check_dtype(kOp, "grad", grad);
  TORCH_CHECK_VALUE(trainable.size() == lora_a.size() && !lora_a.empty() && grad.dim() > 0, kOp, ": got ",
                    trainable.size(), " trainable flags for ", lora_a.size(), " experts and grad ", grad.sizes(),
                    "; expected one each, and grad [..., out_features].");
  const at::ScalarType dtype = grad.scalar_type();
  LoraBackward call{};
  CallStorage storage;
  call.rows = leading_rows(grad);
  call.features = lora_a[0].size(-1);
  call.outputs = grad.size(-1);
  fill_call(call, storage, dtype, lora_a, lora_b, gate, scale, dropout, per_expert, seed, need_gate, row_map);
  bool any_trainable = false;
  for (size_t e = 0; e < trainable.size(); ++e) {
    storage.experts[e].trainable = trainable.get(e);
    storage.experts[e].first_trainable = call.trainable_ranks;
    if (trainable.get(e)) call.trainable_ranks += storage.experts[e].rank;
    any_trainable = any_trainable || trainable.get(e);
  }
  const at::Tensor grad_NP = matrix(grad, dtype);
  call.grad = grad_NP.data_ptr();
  call.grad_stride = grad_NP.stride(0);
  at::Tensor x_ND, s_NR;
  if (any_trainable) {
    TORCH_CHECK_VALUE(x.has_value() && x->size(-1) == call.features && leading_rows(*x) == call.rows, kOp,
                      ": dA wants x [", call.rows, ", ", call.features, "]; pass the forward's.");
    x_ND = matrix(*x, dtype);
    call.x = x_ND.data_ptr();
    call.x_stride = x_ND.stride(0);
  }
  if (any_trainable || need_gate) {
    TORCH_CHECK_VALUE(s.has_value() && s->sizes() == at::IntArrayRef({call.rows, call.ranks}), kOp,
                      ": dB and dgate want S [", call.rows, ", ", call.ranks, "]; pass the forward's.");
    s_NR = s->to(dtype).contiguous();
    call.s = s_NR.data_ptr();
  }
  std::vector<int64_t> shape(grad.sizes().begin(), grad.sizes().end());
  shape.back() = call.features;
  const auto options = grad.options();
  const at::Tensor dx = need_x ? at::empty(shape, options) : at::empty({0}, options);
  const at::Tensor da =
      any_trainable ? at::empty({call.trainable_ranks, call.features}, options) : at::empty({0}, options);
  const at::Tensor db =
      any_trainable ? at::empty({call.trainable_ranks, call.outputs}, options) : at::empty({0}, options);
  const at::Tensor dgate =
      need_gate ? at::empty({call.gates, gate.size(1)}, options.dtype(at::kFloat)) : at::empty({0}, options);
  call.dx = need_x ? dx.data_ptr() : nullptr;
  call.da = any_trainable ? da.data_ptr() : nullptr;
  call.db = any_trainable ? db.data_ptr() : nullptr;
  call.dgate = need_gate ? dgate.data_ptr<float>() : nullptr;
  kernels().lora_backward[dtype == at::kBFloat16](call);
  return {dx, da, db, need_gate ? dgate.to(gate.scalar_type()) : dgate};
}

}  // namespace dmole::cpu
