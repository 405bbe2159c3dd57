// SPDX-License-Identifier: Apache-2.0
#include "router_score_op.h"

#include <ATen/ops/empty.h>

#include <utility>

#include "router_score.h"
#include "tensors.h"

namespace dmole::cpu {

namespace {

template <class T>
void score(const at::Tensor& features, const at::Tensor& encoder_weight, const at::Tensor& encoder_bias,
           const at::Tensor& decoder_weight, const at::Tensor& decoder_bias, bool sigmoid, at::Tensor& error) {
  const Autoencoders<T> all{
      encoder_weight.size(0),    encoder_weight.size(1),      encoder_weight.size(2),    elements<T>(encoder_weight),
      elements<T>(encoder_bias), elements<T>(decoder_weight), elements<T>(decoder_bias), sigmoid};
  const int64_t samples = features.size(0), tile = router_tile(samples);
  const at::Tensor transposed = at::empty({(samples + tile - 1) / tile, all.width, tile}, features.options());
  router_score<T>(torch_parallel_for, samples, elements<T>(features), features.stride(0), all, elements<T>(transposed),
                  elements<T>(error));
}

}  // namespace

at::Tensor router_score_op(const at::Tensor& features, const at::Tensor& encoder_weight, const at::Tensor& encoder_bias,
                           const at::Tensor& decoder_weight, const at::Tensor& decoder_bias, bool sigmoid) {
  check_dtype("router_score", "features", features);
  const std::pair<const char*, const at::Tensor&> weights[] = {{"encoder_weight", encoder_weight},
                                                               {"encoder_bias", encoder_bias},
                                                               {"decoder_weight", decoder_weight},
                                                               {"decoder_bias", decoder_bias}};
  for (const auto& [name, tensor] : weights) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == features.scalar_type(), "router_score: ", name, " is ",
                      tensor.scalar_type(), " and features ", features.scalar_type(),
                      "; expected one dtype. Cast the autoencoders or the features.");
  }
  TORCH_CHECK_VALUE(features.dim() == 2 && encoder_weight.dim() == 3 && encoder_weight.size(2) == features.size(1),
                    "router_score: features has shape ", features.sizes(), " and encoder_weight ",
                    encoder_weight.sizes(),
                    "; expected [samples, features] and [tasks, hidden, features]. Stack them.");
  const int64_t tasks = encoder_weight.size(0), hidden = encoder_weight.size(1), width = encoder_weight.size(2);
  TORCH_CHECK_VALUE(encoder_bias.sizes() == at::IntArrayRef({tasks, hidden}) &&
                        decoder_weight.sizes() == at::IntArrayRef({tasks, width, hidden}) &&
                        decoder_bias.sizes() == at::IntArrayRef({tasks, width}),
                    "router_score: encoder_bias has shape ", encoder_bias.sizes(), ", decoder_weight ",
                    decoder_weight.sizes(), ", decoder_bias ", decoder_bias.sizes(), "; expected those that belong to ",
                    encoder_weight.sizes(), ". Stack the tasks' tensors in dimension 0.");
  at::Tensor error = at::empty({features.size(0), tasks}, features.options());
  const bool rows = features.stride(1) == 1 || width <= 1;
  const auto run = features.scalar_type() == at::kFloat ? score<float> : score<bfloat16>;
  run(rows ? features : features.contiguous(), encoder_weight.contiguous(), encoder_bias.contiguous(),
      decoder_weight.contiguous(), decoder_bias.contiguous(), sigmoid, error);
  return error;
}

at::Tensor router_select_op(const at::Tensor& error, const at::Tensor& threshold, int64_t top_k) {
  TORCH_CHECK_VALUE(error.dim() == 2 && threshold.dim() == 1 && threshold.size(0) == error.size(1),
                    "router_select: error has shape ", error.sizes(), " and threshold ", threshold.sizes(),
                    "; expected [samples, tasks] and [tasks]. Give each task one threshold.");
  const at::Tensor error_NT = error.to(at::kFloat).contiguous(), threshold_T = threshold.to(at::kFloat).contiguous();
  at::Tensor gate = at::empty(error.sizes(), error_NT.options());
  router_select(error.size(0), error.size(1), error_NT.data_ptr<float>(), threshold_T.data_ptr<float>(), top_k,
                gate.data_ptr<float>());
  return gate.to(error.scalar_type());
}

}  // namespace dmole::cpu
