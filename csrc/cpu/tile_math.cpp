// SPDX-License-Identifier: Apache-2.0
#include "tile_math.h"

#include "isa.h"

namespace dmole::cpu {

const TileMath& tile_math() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
    case Isa::avx512:
      return avx512_tile_math();
    case Isa::avx2:
      return avx2_tile_math();
#endif
    default:
      return scalar_tile_math();
  }
}

}  // namespace dmole::cpu
