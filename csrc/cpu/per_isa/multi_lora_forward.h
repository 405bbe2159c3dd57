// SPDX-License-Identifier: Apache-2.0
// The multi-expert LoRA forward: S = x^ A^T (shrink.h), y = base + (S * C) B^T (expand.h), for the pairs of row and
// expert in use. A pair that is not in use is skipped, not multiplied by zero: the values of its expert (or its row, in
// the gradients) affect no output but S and the gate's gradient.
//
// Threads process chunks of rows (S, y, and in backward P, dS, dx) and then column panels (dA, dB): every element has
// one writer, and its sums are over its own row, or over the rows of its expert in order, for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../multi_lora.h"
#include "../row_map.h"
#include "../scratch.h"
#include "expand.h"
#include "lora_weights.h"
#include "packing.h"
#include "philox.h"
#include "shrink.h"

namespace dmole::cpu::DMOLE_ISA {

constexpr int64_t kChunkRows = 8 * kTileRows;
constexpr int64_t kPackedColumns = 8 * kTileColumns;  // of a weight, packed as one work item

inline bool in_use(const RowMap& map, int64_t expert) { return map.start[expert + 1] > map.start[expert]; }

// Rows of a chunk. Weights are read once per chunk, so chunks are larger where experts have few rows each.
inline int64_t chunk_rows(const LoraCall& call) {
  int64_t rows = kChunkRows;
  if (!call.every_column) {
    int64_t used = 0;
    for (int64_t e = 0; e < call.map.experts; ++e) used += in_use(call.map, e);
    rows = std::max(rows, 2 * kTileRows * call.rows * used / std::max<int64_t>(1, call.map.pairs));
  }
  if (call.threads > 1) rows = std::min(rows, (call.rows + call.threads - 1) / call.threads);
  return std::clamp<int64_t>(rows, 1, std::max<int64_t>(1, call.rows));
}

struct PairRange {
  int64_t begin, end;
};

// The expert's pairs with rows in [begin, end).
inline PairRange pairs_of(const RowMap& map, int64_t expert, int64_t begin, int64_t end) {
  const int32_t *first = map.row + map.start[expert], *last = map.row + map.start[expert + 1];
  return {std::lower_bound(first, last, static_cast<int32_t>(begin)) - map.row,
          std::lower_bound(first, last, static_cast<int32_t>(end)) - map.row};
}

inline float factor_of(const LoraCall& call, int64_t row, int64_t expert) {
  return call.factor[row / (call.rows / call.gates) * call.map.experts + expert];
}

// 0, 1, 2, ..: the rows of every_column.
inline std::vector<int32_t> all_rows(const LoraCall& call) {
  std::vector<int32_t> rows(call.every_column ? call.rows : 0);
  for (int64_t n = 0; n < static_cast<int64_t>(rows.size()); ++n) rows[n] = static_cast<int32_t>(n);
  return rows;
}

inline uint32_t mask_stream(const LoraCall& call, int64_t expert) {
  return call.per_expert ? static_cast<uint32_t>(expert) : 0u;
}

// Weights in the forms that a call needs, in one scratch buffer.
template <class T, class Packing>
struct PackedWeights {
  std::vector<WeightRows<T>> rows;
  std::vector<const float*> panels;

  // `of_rows` and `of_panels` choose A or B, with as many columns as given. Rows are packed for the experts whose
  // product is needed, panels for those in use.
  void pack(const LoraCall& call, Weight LoraExpert::* of_rows, int64_t row_columns,
            const std::vector<uint8_t>& rows_wanted, Weight LoraExpert::* of_panels, int64_t panel_columns,
            bool panels_wanted) {
    const int64_t experts = call.map.experts;
    rows.resize(experts);
    panels.resize(experts);
    std::vector<int64_t> row_offset(experts, -1), panel_offset(experts, -1);
    int64_t floats = 0;
    const int64_t stride = packed_stride(row_columns);
    for (int64_t e = 0; e < experts; ++e) {
      const LoraExpert& expert = call.experts[e];
      const Weight& weight = expert.*of_rows;
      const bool used = in_use(call.map, e);
      if (!used && !call.every_column) continue;
      if (rows_wanted[e] && readable_in_place<T>(weight)) {
        rows[e] = {static_cast<const T*>(weight.data), weight.rank_stride};
      } else if (rows_wanted[e]) {
        row_offset[e] = floats;
        floats += (expert.rank * stride * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
      }
      if (panels_wanted && used) {
        panel_offset[e] = floats;
        floats += panel_count(panel_columns) * pack_count(expert.rank, Packing::kPerPack) * kTileColumns;
      }
    }
    float* const memory = scratch(Scratch::lora_weights, floats);
    // Pieces of kPackedColumns columns of one expert and form.
    const int64_t row_pieces = (row_columns + kPackedColumns - 1) / kPackedColumns;
    const int64_t panel_pieces = (panel_columns + kPackedColumns - 1) / kPackedColumns;
    const int64_t pieces = row_pieces + panel_pieces;
    call.parallel(experts * pieces, 8, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t e = item / pieces, piece = item % pieces;
        if (piece < row_pieces && row_offset[e] >= 0) {
          const int64_t c = piece * kPackedColumns;
          pack_weight_rows(call.experts[e].*of_rows, call.experts[e].rank, c, std::min(row_columns, c + kPackedColumns),
                           reinterpret_cast<T*>(memory + row_offset[e]), stride);
        } else if (piece >= row_pieces && panel_offset[e] >= 0) {
          const int64_t c = (piece - row_pieces) * kPackedColumns;
          pack_weight_panels<T, Packing>(call.experts[e].*of_panels, call.experts[e].rank, c,
                                         std::min(panel_columns, c + kPackedColumns), memory + panel_offset[e]);
        }
      }
    });
    for (int64_t e = 0; e < experts; ++e) {
      if (row_offset[e] >= 0) rows[e] = {reinterpret_cast<const T*>(memory + row_offset[e]), stride};
      if (panel_offset[e] >= 0) panels[e] = memory + panel_offset[e];
    }
  }
};

// Experts with rows in [begin, end) (with every_column all experts, of which some have none), with room for their
// coefficients, followed by room for the product of one expert (`extra`).
template <class Packing>
std::vector<ExpertRows> rows_by_expert(const LoraCall& call, int64_t begin, int64_t end, float** extra) {
  std::vector<ExpertRows> groups;
  int64_t floats = 0, largest = 0;
  for (int64_t e = 0; e < call.map.experts; ++e) {
    if (!in_use(call.map, e) && !call.every_column) continue;
    const PairRange pairs = pairs_of(call.map, e, begin, end);
    const int64_t count = pairs.end - pairs.begin;
    if (count == 0 && !call.every_column) continue;
    const int64_t rank = call.experts[e].rank;
    groups.push_back({e, pairs.begin, count, pack_count(rank, Packing::kPerPack), nullptr});
    floats += (count + kTileRows - 1) / kTileRows * kTileRows * groups.back().packs;
    largest = std::max(largest, (call.every_column ? end - begin : count) * rank);
  }
  float* memory = scratch(Scratch::lora_tile, floats + largest);
  *extra = memory + floats;
  for (ExpertRows& group : groups) {
    group.coefficients = memory;
    memory += (group.count + kTileRows - 1) / kTileRows * kTileRows * group.packs;
  }
  return groups;
}

// Value (pair i of the group, rank column j) for expand().
template <class Packing>
void put_coefficient(const ExpertRows& group, int64_t i, int64_t j, float value) {
  const int64_t pack = (i / kTileRows * group.packs + j / Packing::kPerPack) * kTileRows + i % kTileRows;
  Packing::put(group.coefficients, pack, static_cast<int>(j % Packing::kPerPack), value);
}

// An odd rank fills half of its last pack; the other half must be zero.
template <class Packing>
void put_last_half(const ExpertRows& group, int64_t i, int64_t rank) {
  if (rank % Packing::kPerPack != 0) put_coefficient<Packing>(group, i, rank, 0.0f);
}

inline std::vector<uint8_t> rows_with_experts(const RowMap& map, const std::vector<ExpertRows>& groups, int64_t begin,
                                              int64_t end) {
  std::vector<uint8_t> has_experts(end - begin, 0);
  for (const ExpertRows& group : groups) {
    for (int64_t i = 0; i < group.count; ++i) has_experts[map.row[group.pair + i] - begin] = 1;
  }
  return has_experts;
}

// Rows of [begin, end) whose product with A (or B) of an expert is computed: those that use it; all with every_column.
struct ComputedRows {
  const int32_t* row;
  int64_t count;
};

inline ComputedRows computed_rows(const LoraCall& call, const ExpertRows& group, const std::vector<int32_t>& every_row,
                                  int64_t begin, int64_t end) {
  if (call.every_column) return {every_row.data() + begin, end - begin};
  return {call.map.row + group.pair, group.count};
}

template <class T, class Packing>
void forward_chunk(const LoraForward& call, const PackedWeights<T, Packing>& weights, const MaskKey& key,
                   const std::vector<int32_t>& every_row, int64_t begin, int64_t end) {
  float* shrunk;
  const std::vector<ExpertRows> groups = rows_by_expert<Packing>(call, begin, end, &shrunk);
  const std::vector<uint8_t> has_experts = rows_with_experts(call.map, groups, begin, end);
  T* const s = static_cast<T*>(call.s);
  std::fill_n(s + begin * call.ranks, (end - begin) * call.ranks, from_float<T>(0.0f));
  KeepBits keep_bits;
  uint16_t* bits = nullptr;
  if (call.dropout) {
    keep_bits.stride = mask_numbers(call.features);
    bits = reinterpret_cast<uint16_t*>(scratch(Scratch::lora_keep, (end - begin) * keep_bits.stride / 2));
    keep_bits.bits = bits;
    keep_bits.by_pair = call.per_expert;
    keep_bits.origin = begin;
    for (int64_t n = begin; n < end && !call.per_expert; ++n) {
      if (call.every_column || has_experts[n - begin]) {
        mask_row(key, 0, n, call.features, bits + (n - begin) * keep_bits.stride);
      }
    }
  }
  const float kept_scale = call.dropout ? static_cast<float>(1.0 / (1.0 - call.dropout_probability)) : 1.0f;
  const Matrix<T> x{static_cast<const T*>(call.x), call.x_stride};
  for (const ExpertRows& group : groups) {
    const LoraExpert& expert = call.experts[group.expert];
    const ComputedRows rows = computed_rows(call, group, every_row, begin, end);
    if (call.dropout && call.per_expert) {
      keep_bits.origin = 0;
      for (int64_t i = 0; i < rows.count; ++i) {
        mask_row(key, mask_stream(call, group.expert), rows.row[i], call.features, bits + i * keep_bits.stride);
      }
    }
    shrink<T, Packing>({x, rows.row, keep_bits, 0, weights.rows[group.expert], expert.rank, call.features, shrunk},
                       rows.count);
    const int32_t* const used_row = call.map.row + group.pair;
    int64_t used = 0;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t n = rows.row[i];
      float* const values = shrunk + i * expert.rank;
      T* const saved = s + n * call.ranks + expert.first;
      for (int64_t j = 0; j < expert.rank; ++j) {
        values[j] *= kept_scale;
        saved[j] = from_float<T>(values[j]);
      }
      if (used == group.count || used_row[used] != n) continue;
      const float factor = factor_of(call, n, group.expert);
      for (int64_t j = 0; j < expert.rank; ++j) put_coefficient<Packing>(group, used, j, values[j] * factor);
      put_last_half<Packing>(group, used++, expert.rank);
    }
  }
  const Target<T> target{static_cast<T*>(call.y), call.outputs, static_cast<const T*>(call.base), call.base_stride, {}};
  copy_rows_without_experts(target, has_experts.data(), begin, end, call.outputs);
  expand<T, Packing>(call.map, groups, weights.panels.data(), target, begin, end, call.outputs);
}

template <class T>
void lora_forward(const LoraForward& call) {
  using Packing = typename PackingOf<T, T>::type;
  PackedWeights<T, Packing> weights;
  weights.pack(call, &LoraExpert::a, call.features, std::vector<uint8_t>(call.map.experts, 1), &LoraExpert::b,
               call.outputs, true);
  const MaskKey key = mask_key(call.seed, call.dropout_probability);
  const std::vector<int32_t> every_row = all_rows(call);
  const int64_t chunk = chunk_rows(call);
  call.parallel((call.rows + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      forward_chunk<T, Packing>(call, weights, key, every_row, c * chunk, std::min(call.rows, (c + 1) * chunk));
    }
  });
}

}  // namespace dmole::cpu::DMOLE_ISA
