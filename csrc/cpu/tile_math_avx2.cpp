// SPDX-License-Identifier: Apache-2.0
#include <limits>

#include "kernels_std.h"
#include "tile_math.h"

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

#include "tile_math.inl"

}  // namespace avx2

const TileMath& avx2_tile_math() { return avx2::kTileMath; }

}  // namespace dmole::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
