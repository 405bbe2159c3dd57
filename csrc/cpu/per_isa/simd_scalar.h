// SPDX-License-Identifier: Apache-2.0
// Four floats in a vector type of the compiler (GCC and Clang), for any machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "../bfloat16.h"
#include "isa_namespace.h"

namespace dmole::cpu::DMOLE_ISA {

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
constexpr int kDotRows = 2;

inline Vec zero() { return Vec{}; }
inline Vec broadcast(float value) { return Vec{value, value, value, value}; }
inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline Vec load(const bfloat16* from) {
  return Vec{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
}
template <class T>
inline Vec load_part(const T* from, int count) {
  float lanes[4] = {};  // a register indexed by a variable would stay in memory
  for (int i = 0; i < count; ++i) lanes[i] = to_float(from[i]);
  return load(lanes);
}
inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }
template <class T>
inline void store_part(T* to, Vec value, int count) {
  float lanes[4];
  store(lanes, value);
  for (int i = 0; i < count; ++i) to[i] = from_float<T>(lanes[i]);
}
inline void store(bfloat16* to, Vec value) { store_part(to, value, kLanes); }

inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec subtract(Vec a, Vec b) { return a - b; }
inline Vec multiply(Vec a, Vec b) { return a * b; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }

// Lanes whose bit is 0 become 0.0, whatever their value.
inline Vec keep(Vec value, uint32_t bits) {
  for (int i = 0; i < kLanes; ++i) value[i] = (bits >> i) & 1u ? value[i] : 0.0f;
  return value;
}

// Sum of the lanes in a fixed order: halves, then quarters.
inline float sum(Vec value) { return (value[0] + value[2]) + (value[1] + value[3]); }

inline void store_sums(float* to, const Vec* values) {
  for (int i = 0; i < 4; ++i) to[i] = sum(values[i]);
}

// 32-bit integers, for Philox.
typedef uint32_t Ints __attribute__((vector_size(16)));
inline Ints ints(uint32_t value) { return Ints{value, value, value, value}; }
inline Ints counting() { return Ints{0, 1, 2, 3}; }
inline Ints plus(Ints a, Ints b) { return a + b; }
inline Ints exclusive_or(Ints a, Ints b, Ints c) { return a ^ b ^ c; }
inline Ints swapped_halves(Ints a) { return (a << 16) | (a >> 16); }
inline void product(Ints a, Ints b, Ints& high, Ints& low) {
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t whole = static_cast<uint64_t>(a[i]) * b[i];
    high[i] = static_cast<uint32_t>(whole >> 32);
    low[i] = static_cast<uint32_t>(whole);
  }
}
inline uint32_t at_least(Ints a, Ints limit) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] >= limit[i]) << i;
  return bits;
}

inline void transpose(Vec rows[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = kept;
    }
  }
}

}  // namespace dmole::cpu::DMOLE_ISA
