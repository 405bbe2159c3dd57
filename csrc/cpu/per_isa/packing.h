// SPDX-License-Identifier: Apache-2.0
// Packing of the operands of products into 32 bits: one float, or two neighbours along k in bfloat16 for the
// instructions that multiply pairs. The loops of a product are the same for both; only loading packs and the step that
// multiplies them differ.
#pragma once

#include <cstdint>
#include <cstring>

#include "../bfloat16.h"
#include "simd.h"

namespace dmole::cpu::DMOLE_ISA {

constexpr int kTileVecs = 2;
constexpr int kTileColumns = kTileVecs * kLanes;  // register tile of the products: kTileRows x kTileColumns

template <class T>
Vec load_some(const T* from, int count) {
  return count == kLanes ? load(from) : load_part(from, count);
}

template <class T>
void store_some(T* to, Vec value, int count) {
  if (count == kLanes) {
    store(to, value);
  } else {
    store_part(to, value, count);
  }
}

// Bits of the dropout mask, one per column, 16 to a number: those of `kLanes` columns from `column` on.
inline uint32_t lane_bits(const uint16_t* bits, int64_t column) {
  return static_cast<uint32_t>(bits[column / 16]) >> (column % 16);
}

struct FloatPacking {
  static constexpr int kPerPack = 1;
  static Vec step(Vec a, Vec b, Vec c) { return multiply_add(a, b, c); }

  // `packs` packs along k, at most kLanes, from memory contiguous along k that has `elements_left` elements; the other
  // lanes are zero.
  template <class T>
  static Vec along_k(const T* from, int packs, int64_t /*elements_left*/) {
    return load_some(from, packs);
  }
  // kLanes packs, zero where the dropout mask drops the element.
  template <class T>
  static Vec kept_along_k(const T* from, const uint16_t* bits, int64_t column) {
    return keep(load(from), lane_bits(bits, column));
  }
  // Packs across k, from memory contiguous across k: pack i belongs to row or column i.
  template <class T>
  static Vec across_k(const T* from, int64_t /*k_stride*/, int64_t /*elements_left*/, int count) {
    return load_some(from, count);
  }
  template <class T>
  static float single(const T* from, int64_t /*k_stride*/, int64_t /*elements_left*/) {
    return to_float(*from);
  }
  // One pack per column, from the registers of its kPerPack rows of k.
  static Vec pack_of(const Vec* rows) { return rows[0]; }
  // Writes one value of a pack.
  static void put(float* packs, int64_t pack, int /*half*/, float value) { packs[pack] = value; }
};

#if defined(DMOLE_ISA_BF16)
struct Bf16Packing {
  static constexpr int kPerPack = 2;
  static Vec step(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  static Vec along_k(const bfloat16* from, int packs, int64_t elements_left) {
    const int64_t elements = elements_left < 2 * packs ? elements_left : 2 * packs;
    const auto mask = static_cast<__mmask32>((uint64_t{1} << elements) - 1u);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from));
  }
  static Vec kept_along_k(const bfloat16* from, const uint16_t* bits, int64_t column) {
    uint32_t both;
    std::memcpy(&both, bits + column / 16, sizeof(both));
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(both, from));
  }
  static Vec across_k(const bfloat16* from, int64_t k_stride, int64_t elements_left, int count) {
    const uint32_t mask = (1u << count) - 1u;
    return pair_rows(from, mask, elements_left > 1 ? from + k_stride : from, elements_left > 1 ? mask : 0u);
  }
  static float single(const bfloat16* from, int64_t k_stride, int64_t elements_left) {
    const uint32_t high = elements_left > 1 ? from[k_stride].bits : 0u;
    const uint32_t bits = from->bits | (high << 16);
    float pack;
    std::memcpy(&pack, &bits, sizeof(pack));
    return pack;
  }
  static Vec pack_of(const Vec* rows) { return pair_values(rows[0], rows[1]); }
  static void put(float* packs, int64_t pack, int half, float value) {
    const bfloat16 rounded = from_float<bfloat16>(value);
    std::memcpy(reinterpret_cast<char*>(packs + pack) + 2 * half, &rounded, sizeof(rounded));
  }
};
#endif

template <class TA, class TB>
struct PackingOf {
  using type = FloatPacking;
};
#if defined(DMOLE_ISA_BF16)
template <>
struct PackingOf<bfloat16, bfloat16> {
  using type = Bf16Packing;
};
#endif

}  // namespace dmole::cpu::DMOLE_ISA
