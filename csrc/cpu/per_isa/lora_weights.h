// SPDX-License-Identifier: Apache-2.0
// The experts' A and B in the two forms that the products read, packed once per call: rows (contiguous along the long
// side, for sums along it) and panels (packs along the rank, kTileColumns of the long side at a time).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../bfloat16.h"
#include "../multi_lora.h"
#include "packing.h"

namespace dmole::cpu::DMOLE_ISA {

// value(j, c) for `count` columns c from `column`, one register for each j of [j0, j0 + kLanes) that is below `rank`.
template <class T>
void weight_block_of(const T* data, const Weight& weight, int64_t rank, int64_t j0, int64_t column, int count,
                     Vec block[kLanes]) {
  const T* origin = data + j0 * weight.rank_stride + column * weight.column_stride;
  const int ranks = static_cast<int>(std::min<int64_t>(kLanes, rank - j0));
  if (weight.column_stride == 1) {
    for (int j = 0; j < kLanes; ++j) block[j] = j < ranks ? load_some(origin + j * weight.rank_stride, count) : zero();
  } else if (weight.rank_stride == 1) {
    for (int c = 0; c < kLanes; ++c) {
      block[c] = c < count ? load_some(origin + c * weight.column_stride, ranks) : zero();
    }
    transpose(block);
  } else {
    float lanes[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      for (int c = 0; c < kLanes; ++c) {
        const bool there = j < ranks && c < count;
        lanes[c] = there ? to_float(origin[j * weight.rank_stride + c * weight.column_stride]) : 0.0f;
      }
      block[j] = load(lanes);
    }
  }
}

template <class T>
void weight_block(const Weight& weight, int64_t rank, int64_t j0, int64_t column, int count, Vec block[kLanes]) {
  if (weight.is_float) {
    weight_block_of(static_cast<const float*>(weight.data), weight, rank, j0, column, count, block);
  } else {
    weight_block_of(static_cast<const T*>(weight.data), weight, rank, j0, column, count, block);
  }
}

// to[j * stride + c] = value(j, c) for columns [begin, end).
template <class T>
void pack_weight_rows(const Weight& weight, int64_t rank, int64_t begin, int64_t end, T* to, int64_t stride) {
  Vec block[kLanes];
  for (int64_t j0 = 0; j0 < rank; j0 += kLanes) {
    const int ranks = static_cast<int>(std::min<int64_t>(kLanes, rank - j0));
    for (int64_t c = begin; c < end; c += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, end - c));
      weight_block<T>(weight, rank, j0, c, count, block);
      for (int j = 0; j < ranks; ++j) store_some(to + (j0 + j) * stride + c, block[j], count);
    }
  }
}

inline int64_t pack_count(int64_t values, int per_pack) { return (values + per_pack - 1) / per_pack; }

// Panels of columns [begin, end), begin a whole number of panels: panel c / kTileColumns has `packs` rows of
// kTileColumns packs.
template <class T, class Packing>
void pack_weight_panels(const Weight& weight, int64_t rank, int64_t begin, int64_t end, float* to) {
  const int64_t packs = pack_count(rank, Packing::kPerPack);
  Vec block[kLanes];
  for (int64_t c = begin; c < end; c += kLanes) {
    float* const panel = to + c / kTileColumns * packs * kTileColumns + c % kTileColumns;
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - c));
    for (int64_t j0 = 0; j0 < rank; j0 += kLanes) {
      weight_block<T>(weight, rank, j0, c, count, block);
      const int ranks = static_cast<int>(std::min<int64_t>(kLanes, rank - j0));
      for (int j = 0; j < ranks; j += Packing::kPerPack) {
        store(panel + (j0 + j) / Packing::kPerPack * kTileColumns, Packing::pack_of(block + j));
      }
    }
  }
  // A last panel that is half empty is multiplied in full: its empty half must be finite.
  for (int64_t c = (end + kLanes - 1) / kLanes * kLanes; c % kTileColumns != 0; c += kLanes) {
    float* const panel = to + c / kTileColumns * packs * kTileColumns + c % kTileColumns;
    for (int64_t w = 0; w < packs; ++w) store(panel + w * kTileColumns, zero());
  }
}

inline int64_t panel_count(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }

// Row stride of packed rows in elements: whole registers, and not a power of two, which would use the same cache sets.
inline int64_t packed_stride(int64_t columns) { return (columns + 31) / 32 * 32 + 32; }

// An expert's weight as rows: the weight itself where it can be read in place, else a packed copy.
template <class T>
struct WeightRows {
  const T* rows;
  int64_t stride;
};

template <class T>
bool readable_in_place(const Weight& weight) {
  return weight.column_stride == 1 && (!weight.is_float || std::is_same_v<T, float>);
}

}  // namespace dmole::cpu::DMOLE_ISA
