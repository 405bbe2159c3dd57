// SPDX-License-Identifier: Apache-2.0
// The multi-expert LoRA backward: P = dY B, dS = P * C; dx = dS A, dA = dS^T x^, dB^T = (S * C)^T dY over the pairs of
// row and expert in use, dgate = scale sum_j P S over all pairs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../multi_lora.h"
#include "../scratch.h"
#include "expand.h"
#include "lora_weights.h"
#include "multi_lora_forward.h"
#include "packing.h"
#include "philox.h"
#include "row_sums.h"
#include "shrink.h"

namespace dmole::cpu::DMOLE_ISA {

// Results of the chunks of rows for the gradients of the weights (per (row, expert) pair in use) and of the gate.
template <class Packing>
struct PairCoefficients {
  std::vector<int64_t> offset;  // of an expert's packs, [packs along its rows][rank]; -1 when not trainable
  float* ds = nullptr;          // P * C / (1-q), for dA
  float* gated = nullptr;       // S * C, for dB
  float* dot = nullptr;         // [experts, rows]: sum_j P S, for dgate
  uint16_t* bits = nullptr;     // dropout masks, per row or per pair

  void allocate(const LoraBackward& call, bool want_x) {
    const int64_t experts = call.map.experts;
    offset.assign(experts, -1);
    int64_t floats = 0;
    for (int64_t e = 0; e < experts; ++e) {
      if (!call.experts[e].trainable) continue;
      offset[e] = floats;
      floats += pack_count(call.map.start[e + 1] - call.map.start[e], Packing::kPerPack) * call.experts[e].rank;
    }
    const int64_t dots = call.dgate != nullptr ? call.rows * experts : 0;
    const int64_t masks = call.per_expert ? call.map.pairs : call.rows;
    const bool masked = call.dropout && (want_x || call.da != nullptr);
    const int64_t mask_floats = masked ? masks * mask_numbers(call.features) / 2 : 0;
    float* const memory = scratch(Scratch::lora_pairs, 2 * floats + dots + mask_floats);
    ds = memory;
    gated = memory + floats;
    dot = gated + floats;
    if (masked) bits = reinterpret_cast<uint16_t*>(dot + dots);
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t pairs = call.map.start[e + 1] - call.map.start[e];
      if (offset[e] < 0 || pairs % Packing::kPerPack == 0) continue;
      // An odd number of rows fills half of its last packs; the other half must be zero.
      const int64_t last = offset[e] + pairs / Packing::kPerPack * call.experts[e].rank;
      std::fill_n(ds + last, call.experts[e].rank, 0.0f);
      std::fill_n(gated + last, call.experts[e].rank, 0.0f);
    }
  }
};

template <class T, class Packing>
void backward_chunk(const LoraBackward& call, const PackedWeights<T, Packing>& weights,
                    const std::vector<uint8_t>& wanted, const PairCoefficients<Packing>& kept,
                    const KeepBits& keep_bits, const MaskKey& key, const std::vector<int32_t>& every_row, int64_t begin,
                    int64_t end) {
  float* p;
  const std::vector<ExpertRows> groups = rows_by_expert<Packing>(call, begin, end, &p);
  const std::vector<uint8_t> has_experts = rows_with_experts(call.map, groups, begin, end);
  if (kept.bits != nullptr && !call.per_expert) {
    for (int64_t n = begin; n < end; ++n) {
      if (has_experts[n - begin]) mask_row(key, 0, n, call.features, kept.bits + n * keep_bits.stride);
    }
  }
  const float kept_scale = call.dropout ? static_cast<float>(1.0 / (1.0 - call.dropout_probability)) : 1.0f;
  const Matrix<T> grad{static_cast<const T*>(call.grad), call.grad_stride};
  for (const ExpertRows& group : groups) {
    if (!wanted[group.expert]) continue;
    const LoraExpert& expert = call.experts[group.expert];
    const int64_t rank = expert.rank, start = call.map.start[group.expert];
    const ComputedRows rows = computed_rows(call, group, every_row, begin, end);
    shrink<T, Packing>({grad, rows.row, {}, 0, weights.rows[group.expert], rank, call.outputs, p}, rows.count);
    const int32_t* const used_row = call.map.row + group.pair;
    int64_t used = 0;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t n = rows.row[i];
      const float* const p_row = p + i * rank;
      const T* const s = static_cast<const T*>(call.s);
      const T* const s_row = s == nullptr ? nullptr : s + n * call.ranks + expert.first;
      if (call.dgate != nullptr) {
        double total = 0.0;
        for (int64_t j = 0; j < rank; ++j) total += static_cast<double>(p_row[j]) * to_float(s_row[j]);
        kept.dot[group.expert * call.rows + n] = static_cast<float>(total);
      }
      if (used == group.count || used_row[used] != n) continue;
      const int64_t pair = group.pair + used;
      if (kept.bits != nullptr && call.per_expert) {
        mask_row(key, mask_stream(call, group.expert), n, call.features, kept.bits + pair * keep_bits.stride);
      }
      const float factor = factor_of(call, n, group.expert);
      if (call.dx != nullptr) {
        for (int64_t j = 0; j < rank; ++j) put_coefficient<Packing>(group, used, j, p_row[j] * factor * kept_scale);
        put_last_half<Packing>(group, used, rank);
      }
      ++used;
      if (expert.trainable) {
        const int64_t pack = kept.offset[group.expert] + (pair - start) / Packing::kPerPack * rank;
        const int half = static_cast<int>((pair - start) % Packing::kPerPack);
        for (int64_t j = 0; j < rank; ++j) {
          Packing::put(kept.ds, pack + j, half, p_row[j] * factor * kept_scale);
          Packing::put(kept.gated, pack + j, half, to_float(s_row[j]) * factor);
        }
      }
    }
  }
  if (call.dx == nullptr) return;
  const Target<T> target{static_cast<T*>(call.dx), call.features, nullptr, 0, keep_bits};
  copy_rows_without_experts(target, has_experts.data(), begin, end, call.features);
  expand<T, Packing>(call.map, groups, weights.panels.data(), target, begin, end, call.features);
}

// Columns [begin, end) of dA or dB^T for all trainable experts.
template <class T, class Packing>
void gradient_columns(const LoraBackward& call, const std::vector<int64_t>& offset, const Matrix<T>& x,
                      const KeepBits& keep_bits, const float* coefficients, int64_t columns, int64_t begin, int64_t end,
                      T* result) {
  constexpr bool kDirect = std::is_same_v<T, float>;
  const int64_t width = end - begin;
  float* const sums = kDirect ? nullptr : scratch(Scratch::lora_sums, call.trainable_ranks * width);
  for (int64_t e = 0; e < call.map.experts; ++e) {
    const LoraExpert& expert = call.experts[e];
    if (!expert.trainable) continue;
    const int64_t start = call.map.start[e], pairs = call.map.start[e + 1] - start;
    float* out;
    int64_t ldo;
    if constexpr (kDirect) {
      out = result + expert.first_trainable * columns;
      ldo = columns;
    } else {
      out = sums + expert.first_trainable * width - begin;
      ldo = width;
    }
    row_sums<T, Packing>(pairs, call.map.row + start, start, x, keep_bits, coefficients + offset[e], expert.rank, begin,
                         end, out, ldo);
    for (int64_t j = expert.first_trainable; !kDirect && j < expert.first_trainable + expert.rank; ++j) {
      for (int64_t c = 0; c < width; c += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, width - c));
        store_some(result + j * columns + begin + c, load_some(sums + j * width + c, lanes), lanes);
      }
    }
  }
}

inline void gate_gradient(const LoraBackward& call, const float* dot) {
  const int64_t experts = call.map.experts;
  const int64_t rows_per_gate = call.gates == 0 ? 0 : call.rows / call.gates;
  for (int64_t e = 0; e < experts; ++e) {
    const float* value = dot + e * call.rows;
    for (int64_t g = 0; g < call.gates; ++g) {
      double total = 0.0;
      for (int64_t i = 0; i < rows_per_gate; ++i) total += *value++;
      call.dgate[g * experts + e] = static_cast<float>(total * call.experts[e].scale);
    }
  }
}

template <class T>
void lora_backward(const LoraBackward& call) {
  using Packing = typename PackingOf<T, T>::type;
  const int64_t experts = call.map.experts;
  std::vector<uint8_t> wanted(experts, 1);
  for (int64_t e = 0; e < experts; ++e) {
    wanted[e] = call.dx != nullptr || call.dgate != nullptr || call.experts[e].trainable;
  }
  PackedWeights<T, Packing> weights;
  weights.pack(call, &LoraExpert::b, call.outputs, wanted, &LoraExpert::a, call.features, call.dx != nullptr);
  PairCoefficients<Packing> kept;
  kept.allocate(call, call.dx != nullptr);
  KeepBits keep_bits;
  if (kept.bits != nullptr) keep_bits = {kept.bits, mask_numbers(call.features), call.per_expert, 0};
  const MaskKey key = mask_key(call.seed, call.dropout_probability);
  const std::vector<int32_t> every_row = all_rows(call);
  const int64_t chunk = chunk_rows(call);
  call.parallel((call.rows + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      backward_chunk<T, Packing>(call, weights, wanted, kept, keep_bits, key, every_row, c * chunk,
                                 std::min(call.rows, (c + 1) * chunk));
    }
  });
  if (call.dgate != nullptr) gate_gradient(call, kept.dot);
  if (call.da == nullptr) return;
  const int64_t a_panels = panel_count(call.features), b_panels = panel_count(call.outputs);
  call.parallel(a_panels + b_panels, 4, [&](int64_t begin, int64_t end) {
    if (begin < a_panels) {
      gradient_columns<T, Packing>(call, kept.offset, {static_cast<const T*>(call.x), call.x_stride}, keep_bits,
                                   kept.ds, call.features, begin * kTileColumns,
                                   std::min(call.features, end * kTileColumns), static_cast<T*>(call.da));
    }
    if (end > a_panels) {
      const int64_t first = std::max(begin, a_panels) - a_panels;
      gradient_columns<T, Packing>(call, kept.offset, {static_cast<const T*>(call.grad), call.grad_stride}, KeepBits{},
                                   kept.gated, call.outputs, first * kTileColumns,
                                   std::min(call.outputs, (end - a_panels) * kTileColumns), static_cast<T*>(call.db));
    }
  });
}

}  // namespace dmole::cpu::DMOLE_ISA
