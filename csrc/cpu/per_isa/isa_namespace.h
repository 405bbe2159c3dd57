// SPDX-License-Identifier: Apache-2.0
// The namespace of the kernels of one instruction set. avx2.cpp and its neighbours define DMOLE_ISA before they include
// a kernel; a header that is parsed alone gets the portable one.
//
//   DMOLE_ISA         the namespace
//   DMOLE_ISA_LANES   floats in a register: 4, 8 or 16
//   DMOLE_ISA_BF16    defined where the instruction set multiplies pairs of bfloat16
//   DMOLE_ISA_BRGEMM  defined where oneDNN's blocks multiply bfloat16
#pragma once

#if !defined(DMOLE_ISA)
#define DMOLE_ISA scalar
#define DMOLE_ISA_LANES 4
#endif
