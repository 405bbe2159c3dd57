// SPDX-License-Identifier: Apache-2.0
// A level with products of bfloat16 pairs, in the namespace DMOLE_LEVEL: all of a file but its table's name.
#include "brgemm.h"
#include "kernels_std.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#define DMOLE_LEVEL_PAIRS

namespace dmole::cpu {
namespace DMOLE_LEVEL {

#include "simd_avx512.inl"

#include "kernels_level.inl"

}  // namespace DMOLE_LEVEL

}  // namespace dmole::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
