// SPDX-License-Identifier: Apache-2.0
// Work memory of a thread, kept between calls: a kernel's panels cost no allocation.
#pragma once

#include <cstdint>

namespace dmole::cpu {

// One buffer each, so that a kernel may call another one that uses different slots.
enum class Scratch {
  gemm_a,
  gemm_b,
  gemm_c,
  lora_weights,
  lora_slots,
  lora_tile,
  lora_sums,
  lora_keep,
  direct,
  ghost,
  router,
  count
};

// At least `words` 32-bit words, aligned to 64 bytes, content undefined; valid until this thread asks for the slot
// again.
float* scratch(Scratch slot, int64_t words);

// Tests: fill what scratch() hands out with NaN, so that what is read unwritten shows.
void poison_scratch(bool on);

}  // namespace dmole::cpu
