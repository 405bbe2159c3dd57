// SPDX-License-Identifier: Apache-2.0
// Sums of the lanes of four registers at once, each in the order of sum(): half the work of one after the other.
#pragma once

#if !defined(DMOLE_ISA)  // parsed alone
#define DMOLE_ISA avx2
#define DMOLE_ISA_LANES 8
#endif

#include <immintrin.h>

#include "isa_namespace.h"

namespace dmole::cpu::DMOLE_ISA {

inline void store_sums_of_eight(float* to, const __m256* values) {
  // Quarters of two registers side by side, then pairs of all four.
  const __m256d first = _mm256_castps_pd(_mm256_add_ps(_mm256_permute2f128_ps(values[0], values[1], 0x20),
                                                       _mm256_permute2f128_ps(values[0], values[1], 0x31)));
  const __m256d second = _mm256_castps_pd(_mm256_add_ps(_mm256_permute2f128_ps(values[2], values[3], 0x20),
                                                        _mm256_permute2f128_ps(values[2], values[3], 0x31)));
  const __m256 pairs = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(first, second)),
                                     _mm256_castpd_ps(_mm256_unpackhi_pd(first, second)));
  const __m256 sums = _mm256_add_ps(pairs, _mm256_movehdup_ps(pairs));  // 0 . 2 . | 1 . 3 .
  const __m128 even = _mm256_castps256_ps128(sums), odd = _mm256_extractf128_ps(sums, 1);
  _mm_storeu_ps(to, _mm_unpacklo_ps(_mm_shuffle_ps(even, even, 0x88), _mm_shuffle_ps(odd, odd, 0x88)));
}

}  // namespace dmole::cpu::DMOLE_ISA
