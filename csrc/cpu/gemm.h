// SPDX-License-Identifier: Apache-2.0
//     C(m, n) = (accumulate ? C(m, n) : 0) + sum_k A(m, k) B(k, n)
//
// The general product: any strides, float or bfloat16 operands, float sums over k in
// order, in fixed blocks. An element of C depends on its row of A and column of B alone, not on M, N or the rest of the
// call. One thread: callers split the work into tiles.
//
// In per_isa an unqualified `gemm` is the one of that instruction set; elsewhere this one calls the kernel of the
// instruction set in use.
#pragma once

#include <cstdint>
#include <type_traits>

#include "bfloat16.h"
#include "kernels.h"

namespace dmole::cpu {

template <class TA, class TB>
void gemm(int64_t M, int64_t N, int64_t K, const TA* a, int64_t a_row, int64_t a_col, const TB* b, int64_t b_row,
          int64_t b_col, float* c, int64_t ldc, bool accumulate) {
  constexpr int kA = std::is_same_v<TA, bfloat16>, kB = std::is_same_v<TB, bfloat16>;
  kernels().gemm[kA][kB](M, N, K, a, a_row, a_col, b, b_row, b_col, c, ldc, accumulate);
}

}  // namespace dmole::cpu
