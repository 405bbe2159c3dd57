// SPDX-License-Identifier: Apache-2.0
// Work memory of a thread, kept between calls: a kernel's panels cost no allocation.
#pragma once

#include <cstdint>

namespace dmole::cpu {

// What a buffer is for. One buffer per use, so that a kernel may call another one with other uses.
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

// At least `floats` floats, aligned to 64 bytes, content undefined; valid until this thread asks for the same use
// again.
float* scratch(Scratch use, int64_t floats);

// Tests: fill what scratch() hands out with NaN, so that what is read unwritten shows.
void poison_scratch(bool on);

}  // namespace dmole::cpu
