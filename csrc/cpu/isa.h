// SPDX-License-Identifier: Apache-2.0
// The instruction set that the kernels use: detected once, or selected by name.
//
//   scalar        any machine
//   avx2          AVX2, FMA, F16C
//   avx512        AVX-512 F, BW, DQ, VL
//   avx512_bf16   the same with products of bfloat16 pairs
//   brgemm        the same with oneDNN's blocks for the general product of bfloat16: AMX where the machine has it
#pragma once

#include <string>
#include <vector>

namespace dmole::cpu {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, brgemm = 4 };

// The default of this machine: the last of the list that it supports; brgemm only with AMX.
Isa detected_isa();

// The instruction set in use: the one set last, else DMOLE_KERNELS_ISA, else the detected one. Throws
// std::invalid_argument with name, got, expected and remedy for an unknown name or one that this machine lacks.
Isa current_isa();
void set_isa(const std::string& name);  // "auto" goes back to the detected one

// "intel", "amd" or "other".
const char* cpu_maker();

const char* isa_name(Isa isa);
std::vector<std::string> available_isas();  // slowest first

}  // namespace dmole::cpu
