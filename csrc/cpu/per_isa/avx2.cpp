// SPDX-License-Identifier: Apache-2.0
#include "before_target.h"

#if defined(__x86_64__)

#define DMOLE_ISA avx2
#define DMOLE_ISA_LANES 8

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dmole::cpu {
const Kernels& avx2_kernels() { return avx2::kTable; }
}  // namespace dmole::cpu

#endif
