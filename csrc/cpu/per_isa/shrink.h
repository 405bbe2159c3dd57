// SPDX-License-Identifier: Apache-2.0
// out[i, j] = sum_k x[row_i, k] w[j, k]: the long products (S = x^ A^T, P = dY B), both operands contiguous along k and
// read in place. A register holds kLanes partial sums of one element, added up at the end of each block of k.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lora_weights.h"
#include "packing.h"
#include "philox.h"

namespace dmole::cpu::DMOLE_ISA {

constexpr int kDotColumns = 4;
// A block of k: a lane adds 64 products, and the rows of x in a tile stay in the first-level cache.
constexpr int64_t kDotPacks = 64 * kLanes;

// How a tile reads its operands: plain; x under a dropout mask; or with a prefetch of the weights `ahead` elements
// further, which are not in a cache yet, for the columns with a bit in `prefetch_columns`.
enum class Dot { plain, masked, cold };

template <class T, class Packing, int kRows, Dot kDot>
void dot_tile(int64_t elements, const T* const* x, const uint16_t* const* bits, int64_t column, const T* const* w,
              int64_t ahead, unsigned prefetch_columns, float* const* out, int columns, bool accumulate) {
  constexpr bool kMasked = kDot == Dot::masked;
  constexpr int kStep = kLanes * Packing::kPerPack;
  Vec sums[kRows][kDotColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) sums[i][j] = zero();
  }
  int64_t k = 0;
  for (; k + kStep <= elements; k += kStep) {
    Vec weights[kDotColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) {
      weights[j] = Packing::along_k(w[j] + k, kLanes, kStep);
      if (kDot == Dot::cold && (prefetch_columns >> j & 1u) != 0) __builtin_prefetch(w[j] + k + ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec value =
          kMasked ? Packing::kept_along_k(x[i] + k, bits[i], column + k) : Packing::along_k(x[i] + k, kLanes, kStep);
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) sums[i][j] = Packing::step(value, weights[j], sums[i][j]);
    }
  }
  if (k < elements) {
    // The tail is copied to a zeroed buffer and added as one more step.
    const int64_t left = elements - k;
    const int packs = static_cast<int>((left + Packing::kPerPack - 1) / Packing::kPerPack);
    for (int i = 0; i < kRows; ++i) {
      Vec value = Packing::along_k(x[i] + k, packs, left);
      if (kMasked) {
        T copy[kStep] = {};
        std::copy_n(x[i] + k, left, copy);
        value = Packing::kept_along_k(copy, bits[i], column + k);
      }
      for (int j = 0; j < kDotColumns; ++j) {
        sums[i][j] = Packing::step(value, Packing::along_k(w[j] + k, packs, left), sums[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    float total[kDotColumns];
    store_sums(total, sums[i]);
    for (int j = 0; j < columns; ++j) out[i][j] = accumulate ? out[i][j] + total[j] : total[j];
  }
}

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
};

// Rows row[0 ..] of x with weights w [rank, elements] into out [.., rank].
template <class T>
struct Shrink {
  Matrix<T> x;
  const int32_t* row;
  KeepBits keep_bits;
  int64_t pair;
  WeightRows<T> w;
  int64_t rank, elements;
  float* out;
  int64_t next = 0;  // elements from a weight to the one at the same place of the next call; 0 without a next call
};

// Rows [first, first + kRows) of the call.
template <class T, class Packing, int kRows, Dot kDot>
void shrink_rows(const Shrink<T>& call, int64_t first, unsigned prefetch_columns) {
  const int64_t ahead = call.next == 0 ? kDotColumns * call.w.stride : call.next;
  const T* from[kRows];
  const uint16_t* bits[kRows];
  const int32_t* const row = call.row + first;
  for (int64_t k = 0; k == 0 || k < call.elements; k += kDotPacks * Packing::kPerPack) {
    const int64_t some = std::min<int64_t>(kDotPacks * Packing::kPerPack, call.elements - k);
    for (int i = 0; i < kRows; ++i) {
      from[i] = call.x.data + row[i] * call.x.stride + k;
      bits[i] = kDot == Dot::masked ? call.keep_bits.of(row[i], call.pair + first + i) : nullptr;
    }
    for (int64_t j = 0; j < call.rank; j += kDotColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kDotColumns, call.rank - j));
      const T* weights[kDotColumns];
      float* to[kRows];
      for (int c = 0; c < kDotColumns; ++c) {
        weights[c] = call.w.rows + (j + std::min(c, columns - 1)) * call.w.stride + k;
      }
      for (int i = 0; i < kRows; ++i) to[i] = call.out + (first + i) * call.rank + j;
      dot_tile<T, Packing, kRows, kDot>(some, from, bits, k, weights, ahead, prefetch_columns, to, columns, k > 0);
    }
  }
}

// Rows [i, i + count) of the call in the smallest tile that holds them, of at most kRows.
template <class T, class Packing, int kRows, Dot kDot>
void shrink_some(const Shrink<T>& call, int64_t i, int64_t count, unsigned prefetch_columns = 0) {
  if constexpr (kRows > 0) {
    if (count < kRows) return shrink_some<T, Packing, kRows - 1, kDot>(call, i, count, prefetch_columns);
    shrink_rows<T, Packing, kRows, kDot>(call, i, prefetch_columns);
  }
}

template <class T, class Packing, Dot kDot>
void shrink_all(const Shrink<T>& call, int64_t count) {
  // Tiles of about the same size: loading the weights would take as long for a small last one as for a large one.
  const int64_t tiles = (count + kDotRows - 1) / kDotRows, step = (count + tiles - 1) / std::max<int64_t>(1, tiles);
  for (int64_t i = 0, tile = 0; i < count; i += step, ++tile) {
    const int64_t some = std::min(step, count - i);
    // The first rows load the weights of this call into the caches; all rows prefetch a few columns each of those of
    // the next call, so that memory is never idle.
    unsigned prefetch_columns = call.next == 0 && tile == 0 ? ~0u : 0u;
    for (int64_t j = tile; call.next != 0 && j < kDotColumns; j += tiles) prefetch_columns |= 1u << j;
    if (kDot == Dot::cold && prefetch_columns == 0) {
      shrink_some<T, Packing, kDotRows, Dot::plain>(call, i, some);
    } else {
      shrink_some<T, Packing, kDotRows, kDot>(call, i, some, prefetch_columns);
    }
  }
}

template <class T, class Packing>
void shrink(const Shrink<T>& call, int64_t count) {
  if (call.keep_bits.bits == nullptr) {
    shrink_all<T, Packing, Dot::cold>(call, count);
  } else {
    shrink_all<T, Packing, Dot::masked>(call, count);
  }
}

}  // namespace dmole::cpu::DMOLE_ISA
