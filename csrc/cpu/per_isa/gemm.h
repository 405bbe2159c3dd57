// SPDX-License-Identifier: Apache-2.0
// C = A B in blocks that fit the caches; see ../gemm.h.
//
// Packs (packing.h) of A are stored row by row, kDepth of a row contiguous; packs of B in panels of kTileColumns
// columns, one row of the panel per pack of k. A register tile holds kTileRows x kTileColumns sums over one block of
// kDepth packs, which are then added to C: blocks keep long sums accurate, and because their size is fixed the rounding
// of every element is the same for all M and N.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../brgemm.h"
#include "../scratch.h"
#include "packing.h"

namespace dmole::cpu::DMOLE_ISA {

constexpr int64_t kDepth = 256;              // packs of k at once: a panel of B stays in the first-level cache
constexpr int64_t kRowStride = kDepth + 16;  // rows a power of two apart would use the same cache sets
constexpr int64_t kBlockRows = 16 * kTileRows;
constexpr int64_t kPackAhead = 8;  // rows of A prefetched before they are packed

// `count` rows of `packs` packs, kRowStride apart, zeros up to a whole number of registers. Source element (i, k) is
// from[i * stride + k * k_stride].
template <class Packing, class T>
void pack_rows(int64_t count, int64_t elements, const T* from, int64_t stride, int64_t k_stride, float* to) {
  const int64_t packs = (elements + Packing::kPerPack - 1) / Packing::kPerPack;
  if (k_stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t w = 0; w < packs; w += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, packs - w));
        const int64_t k = w * Packing::kPerPack;
        // Short pieces of long rows, which the hardware does not prefetch.
        __builtin_prefetch(from + (i + kPackAhead) * stride + k, 0, 2);
        store(to + i * kRowStride + w, Packing::along_k(from + i * stride + k, lanes, elements - k));
      }
    }
  } else if (stride == 1) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int rows = static_cast<int>(std::min<int64_t>(kLanes, count - i));
      for (int64_t w = 0; w < packs; w += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, packs - w));
        Vec block[kLanes];
        for (int p = 0; p < kLanes; ++p) {
          const int64_t k = (w + p) * Packing::kPerPack;
          block[p] = p < lanes ? Packing::across_k(from + i + k * k_stride, k_stride, elements - k, rows) : zero();
        }
        transpose(block);
        for (int r = 0; r < rows; ++r) store(to + (i + r) * kRowStride + w, block[r]);
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t w = 0; w < packs; ++w) {
        const int64_t k = w * Packing::kPerPack;
        to[i * kRowStride + w] = Packing::single(from + i * stride + k * k_stride, k_stride, elements - k);
      }
      for (int64_t w = packs; w % kLanes != 0; ++w) to[i * kRowStride + w] = 0.0f;
    }
  }
}

// One panel: `columns` contiguous columns (zeros up to kTileColumns), one row per pack of k.
template <class Packing, class T>
void pack_panel(int columns, int64_t elements, const T* from, int64_t stride, int64_t k_stride, float* to) {
  const int64_t packs = (elements + Packing::kPerPack - 1) / Packing::kPerPack;
  for (int v = 0; v < kTileVecs; ++v) {
    const int lanes = std::clamp(columns - v * kLanes, 0, kLanes);
    float* lane = to + v * kLanes;
    const T* origin = from + v * kLanes * stride;
    if (lanes == 0) {
      for (int64_t w = 0; w < packs; ++w) store(lane + w * kTileColumns, zero());
    } else if (stride == 1) {
      for (int64_t w = 0; w < packs; ++w) {
        const int64_t k = w * Packing::kPerPack;
        store(lane + w * kTileColumns, Packing::across_k(origin + k * k_stride, k_stride, elements - k, lanes));
      }
    } else if (k_stride == 1) {
      for (int64_t w = 0; w < packs; w += kLanes) {
        const int some = static_cast<int>(std::min<int64_t>(kLanes, packs - w));
        const int64_t k = w * Packing::kPerPack;
        Vec block[kLanes];
        for (int c = 0; c < kLanes; ++c) {
          block[c] = c < lanes ? Packing::along_k(origin + c * stride + k, some, elements - k) : zero();
        }
        transpose(block);
        for (int p = 0; p < some; ++p) store(lane + (w + p) * kTileColumns, block[p]);
      }
    } else {
      for (int64_t w = 0; w < packs; ++w) {
        const int64_t k = w * Packing::kPerPack;
        for (int c = 0; c < kLanes; ++c) {
          lane[w * kTileColumns + c] =
              c < lanes ? Packing::single(origin + c * stride + k * k_stride, k_stride, elements - k) : 0.0f;
        }
      }
    }
  }
}

// kVecs registers of a panel's columns: a panel with few columns is not multiplied whole.
template <class Packing, int kRows, int kVecs>
void multiply_tile(int64_t packs, const float* a, const float* b, float* c, int64_t ldc, int columns, bool accumulate) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) sums[i][v] = zero();
  }
  for (int64_t w = 0; w < packs; ++w) {
    Vec row[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + w * kTileColumns + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec pack = broadcast(a[i * kRowStride + w]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sums[i][v] = Packing::step(pack, row[v], sums[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      const int lanes = std::clamp(columns - v * kLanes, 0, kLanes);
      float* const to = c + i * ldc + v * kLanes;
      store_some(to, accumulate ? add(load_some(to, lanes), sums[i][v]) : sums[i][v], lanes);
    }
  }
}

template <class Packing, int kVecs, int kRows = kTileRows>
void multiply_rows(int rows, int64_t packs, const float* a, const float* b, float* c, int64_t ldc, int columns,
                   bool accumulate) {
  if constexpr (kRows == 0) {
    return;
  } else {
    if (rows == kRows) {
      multiply_tile<Packing, kRows, kVecs>(packs, a, b, c, ldc, columns, accumulate);
    } else {
      multiply_rows<Packing, kVecs, kRows - 1>(rows, packs, a, b, c, ldc, columns, accumulate);
    }
  }
}

// Rows of A, packed, times one panel of B.
template <class Packing>
struct Block {
  static void multiply(int64_t rows, int64_t packs, const float* a, float* b, float* c, int64_t ldc, int columns,
                       bool accumulate) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int some = static_cast<int>(std::min<int64_t>(kTileRows, rows - i));
      if (columns <= kLanes) {
        multiply_rows<Packing, 1>(some, packs, a + i * kRowStride, b, c + i * ldc, ldc, columns, accumulate);
      } else {
        multiply_rows<Packing, kTileVecs>(some, packs, a + i * kRowStride, b, c + i * ldc, ldc, columns, accumulate);
      }
    }
  }
  static void release() {}
};

#if defined(DMOLE_ISA_BRGEMM)
// A panel of packs has the layout of brgemm's pairs along k.
template <>
struct Block<Bf16Packing> {
  static void multiply(int64_t rows, int64_t packs, const float* a, float* b, float* c, int64_t ldc, int columns,
                       bool accumulate) {
    constexpr int64_t kPacks = kBrgemmDepth / Bf16Packing::kPerPack;
    const int64_t padded = (packs + kPacks - 1) / kPacks * kPacks;
    std::fill_n(b + packs * kTileColumns, (padded - packs) * kTileColumns, 0.0f);
    const int64_t depth = padded * Bf16Packing::kPerPack, lda = kRowStride * Bf16Packing::kPerPack;
    if (columns == kTileColumns) {
      brgemm_block(rows, kTileColumns, depth, a, lda, b, kTileColumns, c, ldc, accumulate);
      return;
    }
    float* const sums = scratch(Scratch::gemm_c, kBlockRows * kTileColumns);
    brgemm_block(rows, kTileColumns, depth, a, lda, b, kTileColumns, sums, kTileColumns, false);
    for (int64_t i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        c[i * ldc + j] = (accumulate ? c[i * ldc + j] : 0.0f) + sums[i * kTileColumns + j];
      }
    }
  }
  static void release() { brgemm_release(); }
};
#endif

template <class TA, class TB>
void gemm(int64_t M, int64_t N, int64_t K, const TA* a, int64_t a_row, int64_t a_col, const TB* b, int64_t b_row,
          int64_t b_col, float* c, int64_t ldc, bool accumulate) {
  using Packing = typename PackingOf<TA, TB>::type;
  constexpr int64_t kElements = kDepth * Packing::kPerPack;
  if (K == 0 && !accumulate) {
    for (int64_t i = 0; i < M; ++i) std::fill_n(c + i * ldc, N, 0.0f);
  }
  float* const packed_a = scratch(Scratch::gemm_a, kBlockRows * kRowStride);
  float* const packed_b = scratch(Scratch::gemm_b, kDepth * kTileColumns);
  for (int64_t i0 = 0; i0 < M; i0 += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, M - i0);
    for (int64_t k0 = 0; k0 < K; k0 += kElements) {
      const int64_t elements = std::min(kElements, K - k0);
      const int64_t packs = (elements + Packing::kPerPack - 1) / Packing::kPerPack;
      pack_rows<Packing>(rows, elements, a + i0 * a_row + k0 * a_col, a_row, a_col, packed_a);
      for (int64_t j0 = 0; j0 < N; j0 += kTileColumns) {
        const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, N - j0));
        pack_panel<Packing>(columns, elements, b + k0 * b_row + j0 * b_col, b_col, b_row, packed_b);
        Block<Packing>::multiply(rows, packs, packed_a, packed_b, c + i0 * ldc + j0, ldc, columns,
                                 accumulate || k0 > 0);
      }
    }
  }
  Block<Packing>::release();
}

}  // namespace dmole::cpu::DMOLE_ISA
