// SPDX-License-Identifier: Apache-2.0
#include <limits>

#include "kernels_std.h"
#include "tile_math.h"

namespace dmole::cpu {
namespace scalar {

#include "simd_scalar.inl"

#include "tile_math.inl"

}  // namespace scalar

const TileMath& scalar_tile_math() { return scalar::kTileMath; }

}  // namespace dmole::cpu
