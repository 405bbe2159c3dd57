// SPDX-License-Identifier: Apache-2.0
// The entry points that exist once per instruction set, and the table of the one in use.
#pragma once

#include <cstdint>
#include <type_traits>

#include "bfloat16.h"
#include "isa.h"
#include "frozen_linear.h"
#include "multi_lora.h"
#include "tile_math.h"

namespace dmole::cpu {

using GemmKernel = void (*)(int64_t M, int64_t N, int64_t K, const void* a, int64_t a_row, int64_t a_col, const void* b,
                            int64_t b_row, int64_t b_col, float* c, int64_t ldc, bool accumulate);

struct Kernels {
  GemmKernel gemm[2][2];                                   // [A is bfloat16][B is bfloat16]
  void (*lora_forward[2])(const LoraForward& call);        // [working type is bfloat16]
  void (*lora_backward[2])(const LoraBackward& call);      // the same
  void (*frozen_linear[2])(const FrozenLinearCall& call);  // the same
  TileMath tile_math;
};

// Of current_isa().
const Kernels& kernels();

// One file each: per_isa/<name>.cpp.
const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& brgemm_kernels();

}  // namespace dmole::cpu
