// SPDX-License-Identifier: Apache-2.0
// The registers of the instruction set that a kernel is compiled for: Vec (kLanes floats), Ints, and what is done with
// them. Each simd_*.h defines the same names.
#pragma once

#include "isa_namespace.h"

#if DMOLE_ISA_LANES == 16
#include "simd_avx512.h"
#elif DMOLE_ISA_LANES == 8
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif
