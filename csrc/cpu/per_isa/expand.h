// SPDX-License-Identifier: Apache-2.0
// y[n, :] = base[n, :] + sum over n's experts of g_e[n, :] W_e: the products with a short k (y += (S C) B^T and
// dx = dS A). A row of several experts keeps its sums in float between them; its last expert adds base and rounds once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../row_map.h"
#include "../scratch.h"
#include "packing.h"
#include "philox.h"

namespace dmole::cpu::DMOLE_ISA {

constexpr int64_t kPartialColumns = 512;  // of the rows' sums that are kept between their experts

template <class T>
struct Target {
  T* y;
  int64_t stride;
  const T* base;  // or null
  int64_t base_stride;
  KeepBits keep_bits;  // applied to each expert's product where by_pair, else to the sum
};

// The rows of one expert in a chunk: coefficients as [block of kTileRows rows][pack][kTileRows].
struct ExpertRows {
  int64_t expert, pair, count, packs;
  float* coefficients;
};

template <class T, class Packing, int kRows>
void expand_tile(int64_t packs, const float* coefficients, const float* panel, const int32_t* row, const int32_t* flags,
                 int64_t pair, const Target<T>& target, int64_t column, int columns, float* partial,
                 int64_t first_row) {
  Vec sums[kRows][kTileVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) sums[i][v] = zero();
  }
  for (int64_t w = 0; w < packs; ++w) {
    Vec weights[kTileVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) weights[v] = load(panel + w * kTileColumns + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec pack = broadcast(coefficients[w * kTileRows + i]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) sums[i][v] = Packing::step(pack, weights[v], sums[i][v]);
    }
  }
  const bool masked = target.keep_bits.bits != nullptr;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const int64_t n = row[i];
    const uint16_t* bits = masked ? target.keep_bits.of(n, pair + i) : nullptr;
    float* const partial_row = partial + (n - first_row) * kPartialColumns;
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) {
      const int lanes = std::min(columns - v * kLanes, kLanes);
      if (lanes <= 0) continue;
      const int64_t c = column + v * kLanes;
      Vec value = sums[i][v];
      if (masked && target.keep_bits.by_pair) value = keep(value, lane_bits(bits, c));
      if (!(flags[i] & kFirst)) value = add(load(partial_row + v * kLanes), value);
      if (!(flags[i] & kLast)) {
        store(partial_row + v * kLanes, value);
        continue;
      }
      if (masked && !target.keep_bits.by_pair) value = keep(value, lane_bits(bits, c));
      if (target.base != nullptr) value = add(load_some(target.base + n * target.base_stride + c, lanes), value);
      store_some(target.y + n * target.stride + c, value, lanes);
    }
  }
}

// kRows rows of a group from its i-th on, columns [begin, end).
template <class T, class Packing, int kRows>
int64_t expand_rows(const RowMap& map, const ExpertRows& group, int64_t i, const float* panel, const Target<T>& target,
                    int64_t begin, int64_t end, float* partial, int64_t first_row) {
  const int64_t pair = group.pair + i;
  const float* const coefficients = group.coefficients + i / kTileRows * group.packs * kTileRows + i % kTileRows;
  for (int64_t c = begin; c < end; c += kTileColumns) {
    const int width = static_cast<int>(std::min<int64_t>(kTileColumns, end - c));
    expand_tile<T, Packing, kRows>(group.packs, coefficients, panel + c / kTileColumns * group.packs * kTileColumns,
                                   map.row + pair, map.flags + pair, pair, target, c, width, partial + (c - begin),
                                   first_row);
  }
  return kRows;
}

// Rows of [begin, end) without an expert: y = base, or zero.
template <class T>
void copy_rows_without_experts(const Target<T>& target, const uint8_t* has_experts, int64_t begin, int64_t end,
                               int64_t columns) {
  for (int64_t n = begin; n < end; ++n) {
    if (has_experts[n - begin]) continue;
    T* const to = target.y + n * target.stride;
    if (target.base == nullptr) {
      std::memset(to, 0, static_cast<size_t>(columns) * sizeof(T));
    } else {
      std::memcpy(to, target.base + n * target.base_stride, static_cast<size_t>(columns) * sizeof(T));
    }
  }
}

inline bool has_partial_sums(const RowMap& map, const std::vector<ExpertRows>& groups) {
  for (const ExpertRows& group : groups) {
    for (int64_t i = 0; i < group.count; ++i) {
      if (map.flags[group.pair + i] != (kFirst | kLast)) return true;
    }
  }
  return false;
}

// All rows [begin, end) of y; panels[e] are expert e's weights. A few rows at a time are computed for all columns,
// so that base and y are read and written sequentially, and panels are read from the second-level cache.
template <class T, class Packing>
void expand(const RowMap& map, const std::vector<ExpertRows>& groups, const float* const* panels,
            const Target<T>& target, int64_t begin, int64_t end, int64_t columns) {
  const bool any_partial = has_partial_sums(map, groups);
  float* const partial = scratch(Scratch::lora_sums, any_partial ? (end - begin) * kPartialColumns : 1);
  const int64_t step = any_partial ? kPartialColumns : std::max<int64_t>(1, columns);
  for (int64_t block = 0; block < columns; block += step) {
    const int64_t stop = std::min(columns, block + step);
    for (const ExpertRows& group : groups) {
      const float* const panel = panels[group.expert];
      for (int64_t i = 0; i < group.count;) {
        const int64_t left = std::min<int64_t>(group.count - i, kTileRows - i % kTileRows);
        if (left >= kTileRows) {
          i += expand_rows<T, Packing, kTileRows>(map, group, i, panel, target, block, stop, partial, begin);
        } else if (left >= 4) {
          i += expand_rows<T, Packing, 4>(map, group, i, panel, target, block, stop, partial, begin);
        } else if (left >= 2) {
          i += expand_rows<T, Packing, 2>(map, group, i, panel, target, block, stop, partial, begin);
        } else {
          i += expand_rows<T, Packing, 1>(map, group, i, panel, target, block, stop, partial, begin);
        }
      }
    }
  }
}

}  // namespace dmole::cpu::DMOLE_ISA
