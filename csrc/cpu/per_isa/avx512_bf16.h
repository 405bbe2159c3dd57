// SPDX-License-Identifier: Apache-2.0
// The kernels with products of bfloat16 pairs, in the namespace DMOLE_ISA: all of a file but the name of its table.
#pragma once

#include "before_target.h"

#if defined(__x86_64__)

#if !defined(DMOLE_ISA)  // parsed alone
#define DMOLE_ISA avx512_bf16
#endif
#define DMOLE_ISA_LANES 16
#define DMOLE_ISA_BF16

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
