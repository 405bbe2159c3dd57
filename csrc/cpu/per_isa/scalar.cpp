// SPDX-License-Identifier: Apache-2.0
#include "before_target.h"

#define DMOLE_ISA scalar
#define DMOLE_ISA_LANES 4

#include "kernels.h"

namespace dmole::cpu {
const Kernels& scalar_kernels() { return scalar::kTable; }
}  // namespace dmole::cpu
