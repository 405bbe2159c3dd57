// SPDX-License-Identifier: Apache-2.0
// The dropout mask of dmole_kernels/_philox.py as bits: bit d % 16 of number d / 16 is set where column d is kept. 16
// consecutive columns read one word of 16 consecutive counters, so a register of decisions is a register of counters.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace dmole::cpu::DMOLE_ISA {

constexpr int kMaskGroup = 128;  // columns decided by 16 counters of four words
constexpr int kGroupNumbers = kMaskGroup / 16;
constexpr int kChains = 4;  // counters in parallel, to hide the latency of the products of a round

inline int64_t mask_numbers(int64_t columns) { return (columns + kMaskGroup - 1) / kMaskGroup * kGroupNumbers; }

struct MaskKey {
  uint32_t round[10][2];
  uint64_t threshold;  // kept when the word is at least this
};

inline MaskKey mask_key(uint64_t seed, double probability) {
  MaskKey key;
  for (uint32_t i = 0; i < 10; ++i) {
    key.round[i][0] = static_cast<uint32_t>(seed) + i * 0x9E3779B9u;
    key.round[i][1] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85u;
  }
  key.threshold = static_cast<uint64_t>(std::nearbyint(probability * 4294967296.0));
  return key;
}

// The mask of one row: mask_numbers(columns) numbers.
inline void mask_row(const MaskKey& key, uint32_t stream, int64_t row, int64_t columns, uint16_t* bits) {
  const int64_t numbers = mask_numbers(columns);
  if (key.threshold > 0xffffffffu) {
    std::fill_n(bits, numbers, uint16_t{0});
    return;
  }
  std::fill_n(bits, numbers, uint16_t{0});
  const Ints limit = ints(static_cast<uint32_t>(key.threshold));
  const Ints factor_0 = ints(0xD2511F53u), factor_1 = ints(0xCD9E8D57u);
  const int64_t counters = numbers * 2;  // 16 for each group of 8 numbers
  for (int64_t begin = 0; begin < counters; begin += kChains * kLanes) {
    Ints word[kChains][4];
    for (int c = 0; c < kChains; ++c) {
      word[c][0] = plus(ints(static_cast<uint32_t>(begin + c * kLanes)), counting());
      word[c][1] = ints(static_cast<uint32_t>(row));
      word[c][2] = ints(stream);
      word[c][3] = ints(0);
    }
    for (int i = 0; i < 10; ++i) {
      const Ints key_0 = ints(key.round[i][0]), key_1 = ints(key.round[i][1]);
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        Ints high_0, low_0, high_1, low_1;
        product(word[c][0], factor_0, high_0, low_0);
        product(word[c][2], factor_1, high_1, low_1);
        word[c][0] = exclusive_or(high_1, word[c][1], key_0);
        word[c][1] = low_1;
        word[c][2] = exclusive_or(high_0, word[c][3], key_1);
        word[c][3] = low_0;
      }
    }
    for (int c = 0; c < kChains; ++c) {
      const int64_t counter = begin + c * kLanes;
      if (counter >= counters) break;
      uint16_t* group = bits + counter / 16 * kGroupNumbers;
      for (int w = 0; w < 4; ++w) {
        group[2 * w] |= static_cast<uint16_t>(at_least(word[c][w], limit) << (counter % 16));
        group[2 * w + 1] |= static_cast<uint16_t>(at_least(swapped_halves(word[c][w]), limit) << (counter % 16));
      }
    }
  }
}

// Masks of several rows, and which one belongs to a pair of row and expert.
struct KeepBits {
  const uint16_t* bits = nullptr;  // null: everything is kept
  int64_t stride = 0;
  bool by_pair = false;  // one mask per (row, expert) pair, else per row
  int64_t origin = 0;    // the first row or pair there is a mask of

  const uint16_t* of(int64_t row, int64_t pair) const { return bits + ((by_pair ? pair : row) - origin) * stride; }
};

}  // namespace dmole::cpu::DMOLE_ISA
