// SPDX-License-Identifier: Apache-2.0
#include "kernels_std.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace dmole::cpu {
namespace avx2 {

#include "simd_avx2.inl"

#include "kernels_level.inl"

}  // namespace avx2

const Kernels& avx2_kernels() { return avx2::kTable; }

}  // namespace dmole::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
