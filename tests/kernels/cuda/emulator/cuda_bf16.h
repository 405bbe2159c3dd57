// SPDX-License-Identifier: Apache-2.0
// bfloat16 on the host: the CPU kernels' type.
#pragma once

#include "cpu/bfloat16.h"

struct __nv_bfloat16 {
  dmole::cpu::bfloat16 value;
};

inline float __bfloat162float(__nv_bfloat16 number) { return dmole::cpu::to_float(number.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {dmole::cpu::from_float<dmole::cpu::bfloat16>(value)}; }
