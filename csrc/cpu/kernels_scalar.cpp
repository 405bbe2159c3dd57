// SPDX-License-Identifier: Apache-2.0
#include "kernels_std.h"

namespace dmole::cpu {
namespace scalar {

#include "simd_scalar.inl"

#include "kernels_level.inl"

}  // namespace scalar

const Kernels& scalar_kernels() { return scalar::kTable; }

}  // namespace dmole::cpu
