// SPDX-License-Identifier: Apache-2.0
// The body of a level: all kernels over its registers, and its table. Included inside the level's namespace, after its
// simd_*.inl.

#include "units.inl"

#include "gemm.inl"

#include "philox.inl"

#include "lora_weights.inl"

#include "shrink.inl"

#include "expand.inl"

#include "row_sums.inl"

#include "multi_lora.inl"

#include "multi_lora_backward.inl"

#include "linear.inl"

#include "tile_math.inl"

template <class TA, class TB>
void gemm_entry(int64_t M, int64_t N, int64_t K, const void* a, int64_t a_row, int64_t a_col, const void* b,
                int64_t b_row, int64_t b_col, float* c, int64_t ldc, bool accumulate) {
  gemm(M, N, K, static_cast<const TA*>(a), a_row, a_col, static_cast<const TB*>(b), b_row, b_col, c, ldc, accumulate);
}

const Kernels kTable = {
    {{gemm_entry<float, float>, gemm_entry<float, bfloat16>},
     {gemm_entry<bfloat16, float>, gemm_entry<bfloat16, bfloat16>}},
    {lora_forward<float>, lora_forward<bfloat16>},
    {lora_backward<float>, lora_backward<bfloat16>},
    {linear<float>, linear<bfloat16>},
    kTileMath,
};
