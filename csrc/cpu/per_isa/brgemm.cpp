// SPDX-License-Identifier: Apache-2.0
#define DMOLE_ISA brgemm
#define DMOLE_ISA_BRGEMM

#include "avx512_bf16.h"

#if defined(__x86_64__)
namespace dmole::cpu {
const Kernels& brgemm_kernels() { return brgemm::kTable; }
}  // namespace dmole::cpu
#endif
