// SPDX-License-Identifier: Apache-2.0
// out[j, c] = sum over an expert's rows of g[row, j] x[row, c]: the weight gradients (dA = dS^T x^, dB^T = (S C)^T dY).
// Rows are read in place; blocks of kRowBlock rows, added up in order, keep long sums accurate.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../bfloat16.h"
#include "lora_weights.h"
#include "packing.h"
#include "philox.h"
#include "shrink.h"

namespace dmole::cpu::DMOLE_ISA {

constexpr int64_t kRowBlock = 128;

// Packs of kTileVecs registers of columns from `column` on: of one row, or of a pair of rows.
template <class T>
void load_rows(FloatPacking, const Matrix<T>& x, const int32_t* row, int64_t pair, int64_t /*left*/,
               const KeepBits& keep_bits, int64_t column, const int* lanes, Vec* values) {
  const T* const from = x.data + row[0] * x.stride + column;
#pragma GCC unroll 2
  for (int v = 0; v < kTileVecs; ++v) {
    values[v] = load_some(from + v * kLanes, lanes[v]);
    if (keep_bits.bits == nullptr || lanes[v] == 0) continue;
    values[v] = keep(values[v], lane_bits(keep_bits.of(row[0], pair), column + v * kLanes));
  }
}

#if defined(DMOLE_ISA_BF16)
inline void load_rows(Bf16Packing, const Matrix<bfloat16>& x, const int32_t* row, int64_t pair, int64_t left,
                      const KeepBits& keep_bits, int64_t column, const int* lanes, Vec* values) {
  const bool two = left > 1;
  const bfloat16* const low = x.data + row[0] * x.stride + column;
  const bfloat16* const high = two ? x.data + row[1] * x.stride + column : low;
#pragma GCC unroll 2
  for (int v = 0; v < kTileVecs; ++v) {
    uint32_t low_bits = (1u << lanes[v]) - 1u, high_bits = two ? low_bits : 0u;
    if (keep_bits.bits != nullptr && lanes[v] > 0) {
      low_bits &= lane_bits(keep_bits.of(row[0], pair), column + v * kLanes);
      if (two) high_bits &= lane_bits(keep_bits.of(row[1], pair + 1), column + v * kLanes);
    }
    values[v] = pair_rows(low + v * kLanes, low_bits, high + v * kLanes, high_bits);
  }
}
#endif

// A block of rows of kTileColumns columns: packs along the rows, as a panel of B in gemm.h.
template <class T, class Packing>
void pack_rows_of_pairs(int64_t pairs, const int32_t* row, int64_t pair, const Matrix<T>& x, const KeepBits& keep_bits,
                        int64_t column, int columns, float* to) {
  int lanes[kTileVecs];
  for (int v = 0; v < kTileVecs; ++v) lanes[v] = std::clamp(columns - v * kLanes, 0, kLanes);
  for (int64_t i = 0; i < pairs; i += Packing::kPerPack) {
    Vec values[kTileVecs];
    load_rows(Packing{}, x, row + i, pair + i, pairs - i, keep_bits, column, lanes, values);
    for (int v = 0; v < kTileVecs; ++v) store(to + i / Packing::kPerPack * kTileColumns + v * kLanes, values[v]);
    // The next panel reads the neighbouring columns of the same rows, too far apart for the hardware to prefetch.
    for (int k = 0; k < Packing::kPerPack && i + k < pairs; ++k) {
      __builtin_prefetch(x.data + row[i + k] * x.stride + column + kTileColumns);
      __builtin_prefetch(x.data + row[i + k] * x.stride + column + kTileColumns + 64 / sizeof(T));
    }
  }
}

// Sums of one block: coefficients are packs along the rows, [pack][rank].
template <class Packing, int kRanks>
int64_t row_sums_tile(int64_t packs, const float* panel, const float* coefficients, int64_t rank, int columns,
                      float* out, int64_t ldo, bool accumulate) {
  Vec sums[kRanks][kTileVecs];
#pragma GCC unroll 16
  for (int j = 0; j < kRanks; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) sums[j][v] = zero();
  }
  for (int64_t w = 0; w < packs; ++w) {
    Vec values[kTileVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) values[v] = load(panel + w * kTileColumns + v * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kRanks; ++j) {
      const Vec pack = broadcast(coefficients[w * rank + j]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) sums[j][v] = Packing::step(pack, values[v], sums[j][v]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kRanks; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) {
      const int lanes = std::clamp(columns - v * kLanes, 0, kLanes);
      float* const to = out + j * ldo + v * kLanes;
      store_some(to, accumulate ? add(load_some(to, lanes), sums[j][v]) : sums[j][v], lanes);
    }
  }
  return kRanks;
}

// Columns [begin, end) of out [rank, ..] for one expert's `pairs` rows from `pair` on.
template <class T, class Packing>
void row_sums(int64_t pairs, const int32_t* row, int64_t pair, const Matrix<T>& x, const KeepBits& keep_bits,
              const float* coefficients, int64_t rank, int64_t begin, int64_t end, float* out, int64_t ldo) {
  if (pairs == 0) {
    for (int64_t j = 0; j < rank; ++j) std::fill(out + j * ldo + begin, out + j * ldo + end, 0.0f);
  }
  alignas(64) float panel[kRowBlock * kTileColumns];
  for (int64_t i = 0; i < pairs; i += kRowBlock) {
    const int64_t some = std::min(kRowBlock, pairs - i);
    const int64_t packs = pack_count(some, Packing::kPerPack);
    const float* const block = coefficients + i / Packing::kPerPack * rank;
    for (int64_t c = begin; c < end; c += kTileColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, end - c));
      pack_rows_of_pairs<T, Packing>(some, row + i, pair + i, x, keep_bits, c, columns, panel);
      float* const to = out + c;
      for (int64_t j = 0; j < rank;) {
        const int64_t left = rank - j;
        if (left >= kTileRows && left != kTileRows + 4) {
          j += row_sums_tile<Packing, kTileRows>(packs, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        } else if (left >= 8 && kTileRows >= 8) {
          j += row_sums_tile<Packing, 8>(packs, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        } else if (left >= 4) {
          j += row_sums_tile<Packing, 4>(packs, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        } else if (left >= 2) {
          j += row_sums_tile<Packing, 2>(packs, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        } else {
          j += row_sums_tile<Packing, 1>(packs, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        }
      }
    }
  }
}

}  // namespace dmole::cpu::DMOLE_ISA
