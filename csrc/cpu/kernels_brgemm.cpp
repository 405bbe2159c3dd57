// SPDX-License-Identifier: Apache-2.0
#define DMOLE_LEVEL brgemm
#define DMOLE_LEVEL_BRGEMM

#include "kernels_avx512_bf16.inl"

#if defined(__x86_64__)
namespace dmole::cpu {
const Kernels& brgemm_kernels() { return brgemm::kTable; }
}  // namespace dmole::cpu
#endif
