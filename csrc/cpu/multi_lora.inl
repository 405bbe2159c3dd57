// SPDX-License-Identifier: Apache-2.0
// The multi-expert LoRA forward and backward over the products of shrink.inl, expand.inl and row_sums.inl.
// Included inside a level's namespace.
//
// Threads take chunks of rows (S, y, P, dS, dx) and then column panels (dA, dB): every element has one writer, and its
// sums run over its own row, or over the expert's rows in order, however the work is cut.

constexpr int64_t kChunkRows = 8 * kTileRows;
constexpr int64_t kPackedColumns = 8 * kTileColumns;  // of a weight, packed as one piece of work

inline bool in_use(const PlanView& plan, int64_t expert) { return plan.start[expert + 1] > plan.start[expert]; }

// Rows handled at once. Weights are read once a chunk: where experts have few rows each, chunks grow.
inline int64_t chunk_rows(const LoraCall& call) {
  int64_t rows = kChunkRows;
  if (!call.every_column) {
    int64_t used = 0;
    for (int64_t e = 0; e < call.plan.experts; ++e) used += in_use(call.plan, e);
    rows = std::max(rows, 2 * kTileRows * call.rows * used / std::max<int64_t>(1, call.plan.slots));
  }
  if (call.threads > 1) rows = std::min(rows, (call.rows + call.threads - 1) / call.threads);
  return std::clamp<int64_t>(rows, 1, std::max<int64_t>(1, call.rows));
}

struct SlotRange {
  int64_t begin, end;
};

// The expert's slots with rows in [begin, end).
inline SlotRange slots_of(const PlanView& plan, int64_t expert, int64_t begin, int64_t end) {
  const int32_t *first = plan.row + plan.start[expert], *last = plan.row + plan.start[expert + 1];
  return {std::lower_bound(first, last, static_cast<int32_t>(begin)) - plan.row,
          std::lower_bound(first, last, static_cast<int32_t>(end)) - plan.row};
}

inline float factor_of(const LoraCall& call, int64_t row, int64_t expert) {
  return call.factor[row / (call.rows / call.gates) * call.plan.experts + expert];
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

// Weights in the forms a call needs, in one piece of scratch.
template <class T, class Unit>
struct PackedWeights {
  std::vector<WeightRows<T>> rows;
  std::vector<const float*> panels;

  // `of_rows` and `of_panels` choose A or B, with as many columns as given; of the experts whose
  // product is computed, those wanted.
  void pack(const LoraCall& call, Weight LoraExpert::* of_rows, int64_t row_columns,
            const std::vector<uint8_t>& rows_wanted, Weight LoraExpert::* of_panels, int64_t panel_columns,
            bool panels_wanted) {
    const int64_t experts = call.plan.experts;
    rows.resize(experts);
    panels.resize(experts);
    std::vector<int64_t> row_offset(experts, -1), panel_offset(experts, -1);
    int64_t words = 0;
    const int64_t stride = packed_stride(row_columns);
    for (int64_t e = 0; e < experts; ++e) {
      const LoraExpert& expert = call.experts[e];
      const Weight& weight = expert.*of_rows;
      const bool used = in_use(call.plan, e);
      if (!used && !call.every_column) continue;
      if (rows_wanted[e] && readable_in_place<T>(weight)) {
        rows[e] = {static_cast<const T*>(weight.data), weight.rank_stride};
      } else if (rows_wanted[e]) {
        row_offset[e] = words;
        words += (expert.rank * stride * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
      }
      if (panels_wanted && used) {
        panel_offset[e] = words;
        words += panel_count(panel_columns) * rank_words(expert.rank, Unit::kPerWord) * kTileColumns;
      }
    }
    float* const memory = scratch(Scratch::lora_weights, words);
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
          pack_weight_panels<T, Unit>(call.experts[e].*of_panels, call.experts[e].rank, c,
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
// coefficients, and behind those for the product of one expert (`extra`).
template <class Unit>
std::vector<ExpertPart> chunk_parts(const LoraCall& call, int64_t begin, int64_t end, float** extra) {
  std::vector<ExpertPart> parts;
  int64_t words = 0, largest = 0;
  for (int64_t e = 0; e < call.plan.experts; ++e) {
    if (!in_use(call.plan, e) && !call.every_column) continue;
    const SlotRange slots = slots_of(call.plan, e, begin, end);
    const int64_t count = slots.end - slots.begin;
    if (count == 0 && !call.every_column) continue;
    const int64_t rank = call.experts[e].rank;
    parts.push_back({e, slots.begin, count, rank_words(rank, Unit::kPerWord), nullptr});
    words += (count + kTileRows - 1) / kTileRows * kTileRows * parts.back().words;
    largest = std::max(largest, (call.every_column ? end - begin : count) * rank);
  }
  float* memory = scratch(Scratch::lora_tile, words + largest);
  *extra = memory + words;
  for (ExpertPart& part : parts) {
    part.coefficients = memory;
    memory += (part.count + kTileRows - 1) / kTileRows * kTileRows * part.words;
  }
  return parts;
}

// Value (slot i of the part, rank column j) for expand().
template <class Unit>
void put_coefficient(const ExpertPart& part, int64_t i, int64_t j, float value) {
  const int64_t word = (i / kTileRows * part.words + j / Unit::kPerWord) * kTileRows + i % kTileRows;
  Unit::put(part.coefficients, word, static_cast<int>(j % Unit::kPerWord), value);
}

// An odd rank leaves half of its last word; it must be zero.
template <class Unit>
void put_last_half(const ExpertPart& part, int64_t i, int64_t rank) {
  if (rank % Unit::kPerWord != 0) put_coefficient<Unit>(part, i, rank, 0.0f);
}

inline std::vector<uint8_t> served_rows(const PlanView& plan, const std::vector<ExpertPart>& parts, int64_t begin,
                                        int64_t end) {
  std::vector<uint8_t> served(end - begin, 0);
  for (const ExpertPart& part : parts) {
    for (int64_t i = 0; i < part.count; ++i) served[plan.row[part.slot + i] - begin] = 1;
  }
  return served;
}

// Rows of [begin, end) whose product with an expert's A (or B) is computed: those that use it, or with every_column
// all.
struct ComputedRows {
  const int32_t* row;
  int64_t count;
};

inline ComputedRows computed_rows(const LoraCall& call, const ExpertPart& part, const std::vector<int32_t>& every_row,
                                  int64_t begin, int64_t end) {
  if (call.every_column) return {every_row.data() + begin, end - begin};
  return {call.plan.row + part.slot, part.count};
}

template <class T, class Unit>
void forward_chunk(const LoraForward& call, const PackedWeights<T, Unit>& weights, const MaskKey& key,
                   const std::vector<int32_t>& every_row, int64_t begin, int64_t end) {
  float* shrunk;
  const std::vector<ExpertPart> parts = chunk_parts<Unit>(call, begin, end, &shrunk);
  const std::vector<uint8_t> served = served_rows(call.plan, parts, begin, end);
  T* const s = static_cast<T*>(call.s);
  std::memset(static_cast<void*>(s + begin * call.ranks), 0,
              static_cast<size_t>((end - begin) * call.ranks) * sizeof(T));
  KeepBits keep_bits;
  uint16_t* bits = nullptr;
  if (call.dropout) {
    keep_bits.stride = mask_numbers(call.features);
    bits = reinterpret_cast<uint16_t*>(scratch(Scratch::lora_keep, (end - begin) * keep_bits.stride / 2));
    keep_bits.bits = bits;
    keep_bits.by_slot = call.per_expert;
    keep_bits.origin = begin;
    for (int64_t n = begin; n < end && !call.per_expert; ++n) {
      if (call.every_column || served[n - begin]) {
        mask_row(key, 0, n, call.features, bits + (n - begin) * keep_bits.stride);
      }
    }
  }
  const float kept_scale = call.dropout ? static_cast<float>(1.0 / (1.0 - call.chance)) : 1.0f;
  const Matrix<T> x{static_cast<const T*>(call.x), call.x_stride};
  for (const ExpertPart& part : parts) {
    const LoraExpert& expert = call.experts[part.expert];
    const ComputedRows rows = computed_rows(call, part, every_row, begin, end);
    if (call.dropout && call.per_expert) {
      keep_bits.origin = 0;
      for (int64_t i = 0; i < rows.count; ++i) {
        mask_row(key, mask_stream(call, part.expert), rows.row[i], call.features, bits + i * keep_bits.stride);
      }
    }
    shrink<T, Unit>({x, rows.row, keep_bits, 0, weights.rows[part.expert], expert.rank, call.features, shrunk},
                    rows.count);
    const int32_t* const used_row = call.plan.row + part.slot;
    int64_t used = 0;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t n = rows.row[i];
      float* const values = shrunk + i * expert.rank;
      T* const saved = s + n * call.ranks + expert.first;
      for (int64_t j = 0; j < expert.rank; ++j) {
        values[j] *= kept_scale;
        saved[j] = from_float<T>(values[j]);
      }
      if (used == part.count || used_row[used] != n) continue;
      const float factor = factor_of(call, n, part.expert);
      for (int64_t j = 0; j < expert.rank; ++j) put_coefficient<Unit>(part, used, j, values[j] * factor);
      put_last_half<Unit>(part, used++, expert.rank);
    }
  }
  const Target<T> target{static_cast<T*>(call.y), call.outputs, static_cast<const T*>(call.base), call.base_stride, {}};
  copy_unserved(target, served.data(), begin, end, call.outputs);
  expand<T, Unit>(call.plan, parts, weights.panels.data(), target, begin, end, call.outputs);
}

template <class T>
void lora_forward(const LoraForward& call) {
  using Unit = typename UnitOf<T, T>::type;
  PackedWeights<T, Unit> weights;
  weights.pack(call, &LoraExpert::a, call.features, std::vector<uint8_t>(call.plan.experts, 1), &LoraExpert::b,
               call.outputs, true);
  const MaskKey key = mask_key(call.seed, call.chance);
  const std::vector<int32_t> every_row = all_rows(call);
  const int64_t chunk = chunk_rows(call);
  call.parallel((call.rows + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      forward_chunk<T, Unit>(call, weights, key, every_row, c * chunk, std::min(call.rows, (c + 1) * chunk));
    }
  });
}
