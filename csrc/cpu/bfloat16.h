// SPDX-License-Identifier: Apache-2.0
// bfloat16 as stored: sixteen bits, no arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

namespace dmole::cpu {

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

// To nearest, ties to even; every NaN becomes the quiet one.
template <>
inline bfloat16 from_float<bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace dmole::cpu
