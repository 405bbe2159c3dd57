// SPDX-License-Identifier: Apache-2.0
#include "masked_pool_op.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "tensors.h"

namespace dmole::cpu {

namespace {

constexpr int64_t kColumns = 256;           // columns of a sample per work item
constexpr int64_t kWorthAThread = 1 << 18;  // elements: about 20 us

template <class T>
void pool(const at::Tensor& hidden, const at::Tensor& mask, at::Tensor& values, at::Tensor& token) {
  const int64_t tokens = hidden.size(1), columns = hidden.size(2), parts = (columns + kColumns - 1) / kColumns;
  const auto kernel = kernels().tile_math.max_pool[std::is_same_v<T, bfloat16>];
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, tokens * kColumns));
  torch_parallel_for(hidden.size(0) * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / parts, column = i % parts * kColumns;
      const int64_t at = sample * columns + column;
      kernel(elements<T>(hidden) + sample * hidden.stride(0) + column,
             static_cast<const uint8_t*>(mask.data_ptr()) + sample * mask.stride(0), mask.stride(1), tokens,
             std::min(kColumns, columns - column), hidden.stride(1), elements<T>(values) + at,
             token.data_ptr<int64_t>() + at);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> masked_max_pool_op(const at::Tensor& hidden, const at::Tensor& mask) {
  check_dtype("masked_max_pool", "hidden", hidden);
  TORCH_CHECK_VALUE(hidden.dim() == 3 && mask.sizes() == hidden.sizes().slice(0, 2) && mask.scalar_type() == at::kBool,
                    "masked_max_pool: hidden has shape ", hidden.sizes(), " and mask ", mask.sizes(), " of ",
                    mask.scalar_type(),
                    "; expected [samples, tokens, features] and bool [samples, tokens]. "
                    "Pass mask != 0.");
  const at::Tensor rows = hidden.stride(2) == 1 || hidden.size(2) <= 1 ? hidden : hidden.contiguous();
  at::Tensor values = at::empty({hidden.size(0), hidden.size(2)}, hidden.options());
  at::Tensor token = at::empty({hidden.size(0), hidden.size(2)}, hidden.options().dtype(at::kLong));
  const auto run = hidden.scalar_type() == at::kFloat ? pool<float> : pool<bfloat16>;
  run(rows, mask, values, token);
  return {values, token};
}

}  // namespace dmole::cpu
