// SPDX-License-Identifier: Apache-2.0
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
namespace avx512_bf16 {

#include "simd_avx512.inl"

#include "kernels_level.inl"

}  // namespace avx512_bf16

const Kernels& avx512_bf16_kernels() { return avx512_bf16::kTable; }

}  // namespace dmole::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
