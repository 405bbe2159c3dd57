// SPDX-License-Identifier: Apache-2.0
// Backward of multi_lora.inl. Included inside a level's namespace.

// What the row chunks leave for the gradients of the weights, per pair of row and expert in use, and of the gate.
template <class Unit>
struct SlotCoefficients {
  std::vector<int64_t> offset;  // of an expert's words, [pair word][rank]; -1 when not trainable
  float* ds = nullptr;          // P * C / (1-q), for dA
  float* gated = nullptr;       // S * C, for dB
  float* dot = nullptr;         // [experts, rows]: sum_j P S, for dgate
  uint16_t* bits = nullptr;     // dropout masks, per row or per slot

  void allocate(const LoraBackward& call, bool want_x) {
    const int64_t experts = call.plan.experts;
    offset.assign(experts, -1);
    int64_t words = 0;
    for (int64_t e = 0; e < experts; ++e) {
      if (!call.experts[e].trainable) continue;
      offset[e] = words;
      words += rank_words(call.plan.start[e + 1] - call.plan.start[e], Unit::kPerWord) * call.experts[e].rank;
    }
    const int64_t dots = call.dgate != nullptr ? call.rows * experts : 0;
    const int64_t masks = call.per_expert ? call.plan.slots : call.rows;
    const bool masked = call.dropout && (want_x || call.da != nullptr);
    const int64_t mask_words = masked ? masks * mask_numbers(call.features) / 2 : 0;
    float* const memory = scratch(Scratch::lora_slots, 2 * words + dots + mask_words);
    ds = memory;
    gated = memory + words;
    dot = gated + words;
    if (masked) bits = reinterpret_cast<uint16_t*>(dot + dots);
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t slots = call.plan.start[e + 1] - call.plan.start[e];
      if (offset[e] < 0 || slots % Unit::kPerWord == 0) continue;
      // The last pair of an odd number of rows: its absent half must be zero.
      const int64_t last = offset[e] + slots / Unit::kPerWord * call.experts[e].rank;
      std::fill_n(ds + last, call.experts[e].rank, 0.0f);
      std::fill_n(gated + last, call.experts[e].rank, 0.0f);
    }
  }
};

template <class T, class Unit>
void backward_chunk(const LoraBackward& call, const PackedWeights<T, Unit>& weights, const std::vector<uint8_t>& wanted,
                    const SlotCoefficients<Unit>& slots, const KeepBits& keep_bits, const MaskKey& key,
                    const std::vector<int32_t>& every_row, int64_t begin, int64_t end) {
  float* p;
  const std::vector<ExpertPart> parts = chunk_parts<Unit>(call, begin, end, &p);
  const std::vector<uint8_t> served = served_rows(call.plan, parts, begin, end);
  if (slots.bits != nullptr && !call.per_expert) {
    for (int64_t n = begin; n < end; ++n) {
      if (served[n - begin]) mask_row(key, 0, n, call.features, slots.bits + n * keep_bits.stride);
    }
  }
  const float kept_scale = call.dropout ? static_cast<float>(1.0 / (1.0 - call.chance)) : 1.0f;
  const Matrix<T> grad{static_cast<const T*>(call.grad), call.grad_stride};
  for (const ExpertPart& part : parts) {
    if (!wanted[part.expert]) continue;
    const LoraExpert& expert = call.experts[part.expert];
    const int64_t rank = expert.rank, start = call.plan.start[part.expert];
    const ComputedRows rows = computed_rows(call, part, every_row, begin, end);
    shrink<T, Unit>({grad, rows.row, {}, 0, weights.rows[part.expert], rank, call.outputs, p}, rows.count);
    const int32_t* const used_row = call.plan.row + part.slot;
    int64_t used = 0;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t n = rows.row[i];
      const float* const p_row = p + i * rank;
      const T* const s = static_cast<const T*>(call.s);
      const T* const s_row = s == nullptr ? nullptr : s + n * call.ranks + expert.first;
      if (call.dgate != nullptr) {
        double total = 0.0;
        for (int64_t j = 0; j < rank; ++j) total += static_cast<double>(p_row[j]) * to_float(s_row[j]);
        slots.dot[part.expert * call.rows + n] = static_cast<float>(total);
      }
      if (used == part.count || used_row[used] != n) continue;
      const int64_t slot = part.slot + used;
      if (slots.bits != nullptr && call.per_expert) {
        mask_row(key, mask_stream(call, part.expert), n, call.features, slots.bits + slot * keep_bits.stride);
      }
      const float factor = factor_of(call, n, part.expert);
      if (call.dx != nullptr) {
        for (int64_t j = 0; j < rank; ++j) put_coefficient<Unit>(part, used, j, p_row[j] * factor * kept_scale);
        put_last_half<Unit>(part, used, rank);
      }
      ++used;
      if (expert.trainable) {
        const int64_t word = slots.offset[part.expert] + (slot - start) / Unit::kPerWord * rank;
        const int half = static_cast<int>((slot - start) % Unit::kPerWord);
        for (int64_t j = 0; j < rank; ++j) {
          Unit::put(slots.ds, word + j, half, p_row[j] * factor * kept_scale);
          Unit::put(slots.gated, word + j, half, to_float(s_row[j]) * factor);
        }
      }
    }
  }
  if (call.dx == nullptr) return;
  const Target<T> target{static_cast<T*>(call.dx), call.features, nullptr, 0, keep_bits};
  copy_unserved(target, served.data(), begin, end, call.features);
  expand<T, Unit>(call.plan, parts, weights.panels.data(), target, begin, end, call.features);
}

// Columns [begin, end) of dA or dB^T for all trainable experts.
template <class T, class Unit>
void gradient_columns(const LoraBackward& call, const std::vector<int64_t>& offset, const Matrix<T>& x,
                      const KeepBits& keep_bits, const float* coefficients, int64_t columns, int64_t begin, int64_t end,
                      T* result) {
  constexpr bool kDirect = std::is_same_v<T, float>;
  const int64_t width = end - begin;
  float* const sums = kDirect ? nullptr : scratch(Scratch::lora_sums, call.trainable_ranks * width);
  for (int64_t e = 0; e < call.plan.experts; ++e) {
    const LoraExpert& expert = call.experts[e];
    if (!expert.trainable) continue;
    const int64_t start = call.plan.start[e], slots = call.plan.start[e + 1] - start;
    float* out;
    int64_t ldo;
    if constexpr (kDirect) {
      out = result + expert.first_trainable * columns;
      ldo = columns;
    } else {
      out = sums + expert.first_trainable * width - begin;
      ldo = width;
    }
    row_sums<T, Unit>(slots, call.plan.row + start, start, x, keep_bits, coefficients + offset[e], expert.rank, begin,
                      end, out, ldo);
    for (int64_t j = expert.first_trainable; !kDirect && j < expert.first_trainable + expert.rank; ++j) {
      for (int64_t c = 0; c < width; c += kLanes) {
        const int part = static_cast<int>(std::min<int64_t>(kLanes, width - c));
        store_some(result + j * columns + begin + c, load_some(sums + j * width + c, part), part);
      }
    }
  }
}

inline void gate_gradient(const LoraBackward& call, const float* dot) {
  const int64_t experts = call.plan.experts;
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
  using Unit = typename UnitOf<T, T>::type;
  const int64_t experts = call.plan.experts;
  std::vector<uint8_t> wanted(experts, 1);
  for (int64_t e = 0; e < experts; ++e) {
    wanted[e] = call.dx != nullptr || call.dgate != nullptr || call.experts[e].trainable;
  }
  PackedWeights<T, Unit> weights;
  weights.pack(call, &LoraExpert::b, call.outputs, wanted, &LoraExpert::a, call.features, call.dx != nullptr);
  SlotCoefficients<Unit> slots;
  slots.allocate(call, call.dx != nullptr);
  KeepBits keep_bits;
  if (slots.bits != nullptr) keep_bits = {slots.bits, mask_numbers(call.features), call.per_expert, 0};
  const MaskKey key = mask_key(call.seed, call.chance);
  const std::vector<int32_t> every_row = all_rows(call);
  const int64_t chunk = chunk_rows(call);
  call.parallel((call.rows + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      backward_chunk<T, Unit>(call, weights, wanted, slots, keep_bits, key, every_row, c * chunk,
                              std::min(call.rows, (c + 1) * chunk));
    }
  });
  if (call.dgate != nullptr) gate_gradient(call, slots.dot);
  if (call.da == nullptr) return;
  const int64_t a_panels = panel_count(call.features), b_panels = panel_count(call.outputs);
  call.parallel(a_panels + b_panels, 4, [&](int64_t begin, int64_t end) {
    if (begin < a_panels) {
      gradient_columns<T, Unit>(call, slots.offset, {static_cast<const T*>(call.x), call.x_stride}, keep_bits, slots.ds,
                                call.features, begin * kTileColumns, std::min(call.features, end * kTileColumns),
                                static_cast<T*>(call.da));
    }
    if (end > a_panels) {
      const int64_t first = std::max(begin, a_panels) - a_panels;
      gradient_columns<T, Unit>(call, slots.offset, {static_cast<const T*>(call.grad), call.grad_stride}, KeepBits{},
                                slots.gated, call.outputs, first * kTileColumns,
                                std::min(call.outputs, (end - a_panels) * kTileColumns), static_cast<T*>(call.db));
    }
  });
}
