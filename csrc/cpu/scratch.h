// SPDX-License-Identifier: Apache-2.0
// Work memory of a thread, reused between calls, so that kernels do not allocate.
#pragma once

#include <cstdint>

namespace dmole::cpu {

// The use of a buffer. One buffer per use, so that a kernel may call another one with other uses.
enum class Scratch {
  gemm_a,
  gemm_b,
  gemm_c,
  lora_weights,
  lora_pairs,
  lora_tile,
  lora_sums,
  lora_keep,
  direct,
  ghost,
  router,
  count
};

// At least `floats` floats, aligned to 64 bytes, content undefined; valid until this thread requests the same use
// again.
float* scratch(Scratch use, int64_t floats);

// For tests: fills the memory that scratch() returns with NaN, which exposes reads of unwritten memory.
void poison_scratch(bool on);

}  // namespace dmole::cpu
