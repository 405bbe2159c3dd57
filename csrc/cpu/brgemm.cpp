// SPDX-License-Identifier: Apache-2.0
#include "brgemm.h"

#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

namespace dmole::cpu {

#if defined(CPUBLAS_BRGEMM_BF16BF16F32)

bool has_brgemm() { return true; }

bool has_amx() {
  static const bool found = at::cpu::init_amx();
  return found;
}

void brgemm_block(int64_t M, int64_t N, int64_t K, const void* a, int64_t lda, const void* b, int64_t ldb, float* c,
                  int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, accumulate, static_cast<const at::BFloat16*>(a),
                              static_cast<const at::BFloat16*>(b), c);
}

void brgemm_release() { at::native::cpublas::brgemm_release(); }

#else

bool has_brgemm() { return false; }
bool has_amx() { return false; }
void brgemm_block(int64_t, int64_t, int64_t, const void*, int64_t, const void*, int64_t, float*, int64_t, bool) {}
void brgemm_release() {}

#endif

}  // namespace dmole::cpu
