// SPDX-License-Identifier: Apache-2.0
// All kernels for one instruction set, and their table.
#pragma once

#include <cstdint>

#include "../bfloat16.h"
#include "../kernels.h"
#include "frozen_linear.h"
#include "gemm.h"
#include "multi_lora_backward.h"
#include "multi_lora_forward.h"
#include "tile_math.h"

namespace dmole::cpu::DMOLE_ISA {

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
    {frozen_linear<float>, frozen_linear<bfloat16>},
    kTileMath,
};

}  // namespace dmole::cpu::DMOLE_ISA
