// SPDX-License-Identifier: Apache-2.0
// Registers of 16 floats.
#pragma once

#if !defined(DMOLE_ISA)  // parsed alone
#define DMOLE_ISA avx512
#define DMOLE_ISA_LANES 16
#endif

#include <immintrin.h>

#include <cstdint>

#include "../bfloat16.h"
#include "isa_namespace.h"
#include "simd_sums.h"

namespace dmole::cpu::DMOLE_ISA {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // register tile of the products: 12 x 2 accumulators of 32 registers
constexpr int kDotRows = 6;    // register tile of products along contiguous k: 6 x 4

inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load_part(const float* from, int count) { return _mm512_maskz_loadu_ps(first(count), from); }
inline void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
inline void store_part(float* to, Vec value, int count) { _mm512_mask_storeu_ps(to, first(count), value); }

inline Vec widened(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
inline Vec load(const bfloat16* from) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline Vec load_part(const bfloat16* from, int count) { return widened(_mm256_maskz_loadu_epi16(first(count), from)); }

// To nearest, ties to even; every NaN becomes a quiet one.
#if defined(DMOLE_ISA_BF16)
inline __m256i narrowed(Vec value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }
#else
inline __m256i narrowed(Vec value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(chosen);
}
#endif
inline void store(bfloat16* to, Vec value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(value)); }
inline void store_part(bfloat16* to, Vec value, int count) {
  _mm256_mask_storeu_epi16(to, first(count), narrowed(value));
}

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// Lanes whose bit is 0 become 0.0, whatever their value.
inline Vec keep(Vec value, uint32_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), value); }

// Sum of the lanes in a fixed order: halves, quarters, and so on.
inline float sum(Vec value) {
  const __m256 low = _mm512_castps512_ps256(value);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1));
  const __m256 eight = _mm256_add_ps(low, high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline void store_sums(float* to, const Vec* values) {
  __m256 eight[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(values[i]), 1));
    eight[i] = _mm256_add_ps(_mm512_castps512_ps256(values[i]), high);
  }
  store_sums_of_eight(to, eight);
}

// Pack i of the result is the pair (low[i], high[i]), zero where a mask has no bit; nothing is read there.
inline Vec pair_rows(const bfloat16* low, uint32_t low_bits, const bfloat16* high, uint32_t high_bits) {
  const auto low_mask = static_cast<__mmask16>(low_bits), high_mask = static_cast<__mmask16>(high_bits);
  const __m512i lower = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low_mask, low));
  const __m512i upper = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high_mask, high));
  return _mm512_castsi512_ps(_mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
}

// Pack i of the result is the pair of both values rounded.
inline Vec pair_values(Vec low, Vec high) {
  const __m512i lower = _mm512_cvtepu16_epi32(narrowed(low)), upper = _mm512_cvtepu16_epi32(narrowed(high));
  return _mm512_castsi512_ps(_mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
}

// 32-bit integers, for Philox.
using Ints = __m512i;
inline Ints ints(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
inline Ints counting() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints exclusive_or(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
inline Ints swapped_halves(Ints a) { return _mm512_rol_epi32(a, 16); }
inline void product(Ints a, Ints b, Ints& high, Ints& low) {
  const __m512i even = _mm512_mul_epu32(a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}
inline uint32_t at_least(Ints a, Ints limit) { return _mm512_cmpge_epu32_mask(a, limit); }

inline void transpose(Vec rows[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  __m512 q[16];
  for (int i = 0; i < 16; i += 4) {
    q[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    q[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    q[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    q[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  // q[4 g + c] holds, in 128-bit block b, column 4 b + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 low_even = _mm512_shuffle_f32x4(q[c], q[4 + c], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(q[c], q[4 + c], 0xdd);
    const __m512 high_even = _mm512_shuffle_f32x4(q[8 + c], q[12 + c], 0x88);
    const __m512 high_odd = _mm512_shuffle_f32x4(q[8 + c], q[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(low_even, high_even, 0xdd);
    rows[4 + c] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    rows[12 + c] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
}

}  // namespace dmole::cpu::DMOLE_ISA
