// SPDX-License-Identifier: Apache-2.0
// y[n, :] = base[n, :] + sum over n's experts of g_e[n, :] W_e: the products with a short k (y += (S C) B^T and
// dx = dS A). Sums of a row with several experts wait in float between them; base is added and the result rounded once,
// by the row's last expert. Included inside a level's namespace.

constexpr int64_t kWaitingColumns = 512;  // whose sums are kept at once, where a row's experts take turns

template <class T>
struct Target {
  T* y;
  int64_t stride;
  const T* base;  // or null
  int64_t base_stride;
  KeepBits keep_bits;  // applied to an expert's part where by_slot, else to the whole
};

// The rows of one expert in a chunk: coefficients as [block of kTileRows rows][word][kTileRows].
struct ExpertPart {
  int64_t expert, slot, count, words;
  float* coefficients;
};

template <class T, class Unit, int kRows>
void expand_tile(int64_t words, const float* coefficients, const float* panel, const int32_t* row, const int32_t* flags,
                 int64_t slot, const Target<T>& target, int64_t column, int columns, float* waiting,
                 int64_t first_row) {
  Vec sums[kRows][kTileVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) sums[i][v] = zero();
  }
  for (int64_t w = 0; w < words; ++w) {
    Vec weights[kTileVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) weights[v] = load(panel + w * kTileColumns + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec word = broadcast(coefficients[w * kTileRows + i]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) sums[i][v] = Unit::step(word, weights[v], sums[i][v]);
    }
  }
  const bool masked = target.keep_bits.bits != nullptr;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const int64_t n = row[i];
    const uint16_t* bits = masked ? target.keep_bits.of(n, slot + i) : nullptr;
    float* const wait = waiting + (n - first_row) * kWaitingColumns;
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) {
      const int part = std::min(columns - v * kLanes, kLanes);
      if (part <= 0) continue;
      const int64_t c = column + v * kLanes;
      Vec value = sums[i][v];
      if (masked && target.keep_bits.by_slot) value = keep(value, lane_bits(bits, c));
      if (!(flags[i] & kFirst)) value = add(load(wait + v * kLanes), value);
      if (!(flags[i] & kLast)) {
        store(wait + v * kLanes, value);
        continue;
      }
      if (masked && !target.keep_bits.by_slot) value = keep(value, lane_bits(bits, c));
      if (target.base != nullptr) value = add(load_some(target.base + n * target.base_stride + c, part), value);
      store_some(target.y + n * target.stride + c, value, part);
    }
  }
}

// kRows rows of a part from its i-th on, columns [begin, end).
template <class T, class Unit, int kRows>
int64_t expand_rows(const PlanView& plan, const ExpertPart& part, int64_t i, const float* panel,
                    const Target<T>& target, int64_t begin, int64_t end, float* waiting, int64_t first_row) {
  const int64_t slot = part.slot + i;
  const float* const coefficients = part.coefficients + i / kTileRows * part.words * kTileRows + i % kTileRows;
  for (int64_t c = begin; c < end; c += kTileColumns) {
    const int width = static_cast<int>(std::min<int64_t>(kTileColumns, end - c));
    expand_tile<T, Unit, kRows>(part.words, coefficients, panel + c / kTileColumns * part.words * kTileColumns,
                                plan.row + slot, plan.flags + slot, slot, target, c, width, waiting + (c - begin),
                                first_row);
  }
  return kRows;
}

// Rows [begin, end) that no expert serves: y = base, or zero.
template <class T>
void copy_unserved(const Target<T>& target, const uint8_t* served, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t n = begin; n < end; ++n) {
    if (served[n - begin]) continue;
    T* const to = target.y + n * target.stride;
    if (target.base == nullptr) {
      std::memset(to, 0, static_cast<size_t>(columns) * sizeof(T));
    } else {
      std::memcpy(to, target.base + n * target.base_stride, static_cast<size_t>(columns) * sizeof(T));
    }
  }
}

inline bool any_waits(const PlanView& plan, const std::vector<ExpertPart>& parts) {
  for (const ExpertPart& part : parts) {
    for (int64_t i = 0; i < part.count; ++i) {
      if (plan.flags[part.slot + i] != (kFirst | kLast)) return true;
    }
  }
  return false;
}

// All rows [begin, end) of y; panels[e] are expert e's weights. A few rows at a time run through all columns, so that
// base and y are read and written in streams, and the panels come from the second-level cache.
template <class T, class Unit>
void expand(const PlanView& plan, const std::vector<ExpertPart>& parts, const float* const* panels,
            const Target<T>& target, int64_t begin, int64_t end, int64_t columns) {
  const bool waits = any_waits(plan, parts);
  float* const waiting = scratch(Scratch::lora_sums, waits ? (end - begin) * kWaitingColumns : 1);
  const int64_t step = waits ? kWaitingColumns : std::max<int64_t>(1, columns);
  for (int64_t block = 0; block < columns; block += step) {
    const int64_t stop = std::min(columns, block + step);
    for (const ExpertPart& part : parts) {
      const float* const panel = panels[part.expert];
      for (int64_t i = 0; i < part.count;) {
        const int64_t left = std::min<int64_t>(part.count - i, kTileRows - i % kTileRows);
        if (left >= kTileRows) {
          i += expand_rows<T, Unit, kTileRows>(plan, part, i, panel, target, block, stop, waiting, begin);
        } else if (left >= 4) {
          i += expand_rows<T, Unit, 4>(plan, part, i, panel, target, block, stop, waiting, begin);
        } else if (left >= 2) {
          i += expand_rows<T, Unit, 2>(plan, part, i, panel, target, block, stop, waiting, begin);
        } else {
          i += expand_rows<T, Unit, 1>(plan, part, i, panel, target, block, stop, waiting, begin);
        }
      }
    }
  }
}
