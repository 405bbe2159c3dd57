// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

namespace dmole::cpu {

const Kernels& kernels() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::brgemm:
      return brgemm_kernels();
    case Isa::avx512_bf16:
      return avx512_bf16_kernels();
    case Isa::avx512:
      return avx512_kernels();
    case Isa::avx2:
      return avx2_kernels();
#endif
    default:
      return scalar_kernels();
  }
}

}  // namespace dmole::cpu
