// SPDX-License-Identifier: Apache-2.0
#include "multi_lora_op.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "multi_lora.h"
#include "row_map.h"

namespace dmole::cuda {

namespace {

ElementType element_type(const char* name, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return kFloat;
    case at::kHalf:
      return kHalf;
    case at::kBFloat16:
      return kBFloat16;
    default:
      break;
  }
  TORCH_CHECK_VALUE(false, "cuda_decode: ", name, " is ", dtype,
                    "; expected float32, float16 or bfloat16. Cast it or pass backend='reference'.");
}

bool in_rows(const at::Tensor& tensor) { return tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1); }

void check_gate(const char* op, const at::Tensor& gate, int64_t rows) {
  TORCH_CHECK_VALUE(gate.dim() == 2 && gate.scalar_type() == at::kFloat && gate.is_contiguous() && gate.size(1) > 0 &&
                        (gate.size(0) == 0 ? rows == 0 : rows >= 0 && rows % gate.size(0) == 0),
                    op, ": gate is ", gate.scalar_type(), " ", gate.sizes(), " for ", rows,
                    " rows; expected contiguous float32 [gates, experts] with gates a divisor of rows.");
}

void* stream_of(const at::Tensor& tensor) { return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream(); }

void check_launch(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

}  // namespace

std::tuple<at::Tensor, at::Tensor> decode_op(const at::Tensor& x, const std::optional<at::Tensor>& base,
                                             const at::Tensor& gate, const at::Tensor& columns, const at::Tensor& spans,
                                             int64_t outputs, at::ScalarType expert_dtype, bool a_aligned,
                                             bool b_aligned) {
  const int64_t rows = x.size(0);
  TORCH_CHECK_VALUE(in_rows(x) && rows <= kMostRows, "cuda_decode: x has shape ", x.sizes(), " and strides ",
                    x.strides(), "; expected at most ", kMostRows, " rows of neighbouring features.");
  check_gate("cuda_decode", gate, rows);
  TORCH_CHECK_VALUE(!base.has_value() || (in_rows(*base) && base->sizes() == at::IntArrayRef({rows, outputs}) &&
                                          base->scalar_type() == x.scalar_type()),
                    "cuda_decode: base is not [", rows, ", ", outputs, "] of ", x.scalar_type(),
                    " in rows; pass the layer's output for this x.");
  TORCH_CHECK_VALUE(columns.dim() == 2 && columns.scalar_type() == at::kLong && columns.is_contiguous() &&
                        spans.scalar_type() == at::kInt && spans.is_contiguous() &&
                        spans.sizes() == at::IntArrayRef({gate.size(1), 2}),
                    "cuda_decode: the tables are ", columns.sizes(), " and ", spans.sizes(),
                    "; expected those of triton_backend/columns.py for ", gate.size(1), " experts.");
  for (const at::Tensor& tensor : {gate, columns, spans, base.value_or(x)}) {
    TORCH_CHECK_VALUE(tensor.device() == x.device(), "cuda_decode: got tensors on ", tensor.device(), " and ",
                      x.device(), "; expected one device. Move them to x's.");
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor y = at::empty({rows, outputs}, x.options());
  const at::Tensor s = at::empty({rows, columns.size(1)}, x.options());
  DecodeCall call{};
  call.x = x.data_ptr();
  call.x_step = x.stride(0);
  call.base = base.has_value() ? base->data_ptr() : nullptr;
  call.base_step = base.has_value() ? base->stride(0) : 0;
  call.y = y.data_ptr();
  call.s = s.data_ptr();
  call.gate = gate.data_ptr<float>();
  call.columns = columns.data_ptr<int64_t>();
  call.spans = spans.data_ptr<int32_t>();
  call.rows = rows;
  call.features = x.size(1);
  call.outputs = outputs;
  call.ranks = columns.size(1);
  call.experts = gate.size(1);
  call.gates = gate.size(0);
  call.type = element_type("x", x.scalar_type());
  call.expert_type = element_type("an expert", expert_dtype);
  call.a_aligned = a_aligned;
  call.b_aligned = b_aligned;
  check_launch(dmole_cuda_decode(&call, stream_of(x)));
  return {y, s};
}

std::tuple<at::Tensor, at::Tensor> row_map_op(const at::Tensor& gate, int64_t rows) {
  check_gate("cuda_row_map", gate, rows);
  const int64_t experts = gate.size(1);
  TORCH_CHECK_VALUE(rows <= std::numeric_limits<int32_t>::max() / experts, "cuda_row_map: the gate joins ", rows,
                    " rows and ", experts, " experts in more than 2^31 pairs; expected fewer. Use smaller batches.");
  const c10::cuda::CUDAGuard guard(gate.device());
  const auto options = gate.options().dtype(at::kInt);
  const at::Tensor table = at::empty({row_map_capacity(rows, experts)}, options);
  const at::Tensor needed = at::empty({row_map_tiles(rows), row_map_needed_words(experts)}, options);
  const at::Tensor counts = at::empty({experts, row_map_tiles(rows)}, options);
  RowMapCall call{};
  call.gate = gate.data_ptr<float>();
  call.table = table.data_ptr<int32_t>();
  call.needed = reinterpret_cast<uint32_t*>(needed.data_ptr<int32_t>());
  call.counts = counts.data_ptr<int32_t>();
  call.rows = rows;
  call.experts = experts;
  call.gates = gate.size(0);
  check_launch(dmole_cuda_row_map(&call, stream_of(gate)));
  return {table, needed};
}

}  // namespace dmole::cuda
