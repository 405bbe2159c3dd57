// SPDX-License-Identifier: Apache-2.0
#define DMOLE_LEVEL avx512_bf16

#include "kernels_avx512_bf16.inl"

#if defined(__x86_64__)
namespace dmole::cpu {
const Kernels& avx512_bf16_kernels() { return avx512_bf16::kTable; }
}  // namespace dmole::cpu
#endif
