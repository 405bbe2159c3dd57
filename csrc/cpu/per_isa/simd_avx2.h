// SPDX-License-Identifier: Apache-2.0
// Registers of 8 floats.
#pragma once

#if !defined(DMOLE_ISA)  // parsed alone
#define DMOLE_ISA avx2
#define DMOLE_ISA_LANES 8
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../bfloat16.h"
#include "isa_namespace.h"
#include "simd_sums.h"

namespace dmole::cpu::DMOLE_ISA {

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // register tile of the products: 6 x 2 accumulators of 16 registers
constexpr int kDotRows = 2;   // register tile of products along contiguous k: 2 x 4

inline __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float value) { return _mm256_set1_ps(value); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load_part(const float* from, int count) { return _mm256_maskload_ps(from, first(count)); }
inline void store(float* to, Vec value) { _mm256_storeu_ps(to, value); }
inline void store_part(float* to, Vec value, int count) { _mm256_maskstore_ps(to, first(count), value); }

inline Vec widened(__m128i halves) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)); }
inline __m128i part_of(const bfloat16* from, int count) {
  alignas(16) uint16_t copy[8] = {};
  std::memcpy(copy, from, static_cast<size_t>(count) * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(copy));
}
inline Vec load(const bfloat16* from) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
inline Vec load_part(const bfloat16* from, int count) { return widened(part_of(from, count)); }

// To nearest, ties to even; every NaN becomes a quiet one.
inline __m128i narrowed(Vec value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0xd8);
  return _mm256_castsi256_si128(packed);
}
inline void store(bfloat16* to, Vec value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrowed(value)); }
inline void store_part(bfloat16* to, Vec value, int count) {
  alignas(16) uint16_t copy[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(copy), narrowed(value));
  std::memcpy(to, copy, static_cast<size_t>(count) * sizeof(uint16_t));
}

inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

// Lanes whose bit is 0 become 0.0, whatever their value.
inline Vec keep(Vec value, uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return _mm256_and_ps(value, _mm256_castsi256_ps(set));
}

// Sum of the lanes in a fixed order: halves, quarters, and so on.
inline float sum(Vec value) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline void store_sums(float* to, const Vec* values) { store_sums_of_eight(to, values); }

// 32-bit integers, for Philox.
using Ints = __m256i;
inline Ints ints(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
inline Ints counting() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints exclusive_or(Ints a, Ints b, Ints c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Ints swapped_halves(Ints a) { return _mm256_or_si256(_mm256_slli_epi32(a, 16), _mm256_srli_epi32(a, 16)); }
inline void product(Ints a, Ints b, Ints& high, Ints& low) {
  const __m256i even = _mm256_mul_epu32(a, b);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
inline uint32_t at_least(Ints a, Ints limit) {
  const __m256i greater_or_equal = _mm256_cmpeq_epi32(_mm256_max_epu32(a, limit), a);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(greater_or_equal)));
}

inline void transpose(Vec rows[8]) {
  __m256 t[8], q[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    q[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    q[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    q[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    q[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(q[c], q[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(q[c], q[4 + c], 0x31);
  }
}

}  // namespace dmole::cpu::DMOLE_ISA
