// SPDX-License-Identifier: Apache-2.0
#define DMOLE_ISA avx512_bf16

#include "avx512_bf16.h"

#if defined(__x86_64__)
namespace dmole::cpu {
const Kernels& avx512_bf16_kernels() { return avx512_bf16::kTable; }
}  // namespace dmole::cpu
#endif
