// SPDX-License-Identifier: Apache-2.0
// The block product of oneDNN that PyTorch carries: AMX tiles where the machine has them, else AVX-512 BF16.
#pragma once

#include <cstdint>

namespace dmole::cpu {

// K must be a multiple of this many elements (AMX); pad with zeros.
constexpr int64_t kBrgemmDepth = 32;

// Whether this build of PyTorch has it; it needs a machine with AVX-512 BF16 at least.
bool has_brgemm();
// Whether the machine multiplies with AMX tiles, and lets this process do so.
bool has_amx();

// C(m, n) = (accumulate ? C(m, n) : 0) + sum_k A(m, k) B(k, n) in bfloat16 and float: rows of A lda elements apart; B
// in pairs along k, B(k, n) at b[(k / 2 * ldb + n) * 2 + k % 2].
void brgemm_block(int64_t M, int64_t N, int64_t K, const void* a, int64_t lda, const void* b, int64_t ldb, float* c,
                  int64_t ldc, bool accumulate);
// Gives the tiles back: once after a thread's last block.
void brgemm_release();

}  // namespace dmole::cpu
