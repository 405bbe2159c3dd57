// SPDX-License-Identifier: Apache-2.0
// out[j, c] = sum over an expert's rows of g[row, j] x[row, c]: the weight gradients (dA = dS^T x^, dB^T = (S C)^T dY).
// Rows are read where they lie; blocks of kRowBlock slots, added up in order, keep long sums accurate.
// Included inside a level's namespace.

constexpr int64_t kRowBlock = 128;

// Words of kTileVecs registers of columns from `column` on: of one row, or of a pair of rows.
template <class T>
void load_rows(Floats, const Matrix<T>& x, const int32_t* row, int64_t slot, int64_t /*left*/,
               const KeepBits& keep_bits, int64_t column, const int* part, Vec* values) {
  const T* const from = x.data + row[0] * x.stride + column;
#pragma GCC unroll 2
  for (int v = 0; v < kTileVecs; ++v) {
    values[v] = load_some(from + v * kLanes, part[v]);
    if (keep_bits.bits == nullptr || part[v] == 0) continue;
    values[v] = keep(values[v], lane_bits(keep_bits.of(row[0], slot), column + v * kLanes));
  }
}

#if defined(DMOLE_LEVEL_PAIRS)
inline void load_rows(Pairs, const Matrix<bfloat16>& x, const int32_t* row, int64_t slot, int64_t left,
                      const KeepBits& keep_bits, int64_t column, const int* part, Vec* values) {
  const bool pair = left > 1;
  const bfloat16* const low = x.data + row[0] * x.stride + column;
  const bfloat16* const high = pair ? x.data + row[1] * x.stride + column : low;
#pragma GCC unroll 2
  for (int v = 0; v < kTileVecs; ++v) {
    uint32_t low_bits = (1u << part[v]) - 1u, high_bits = pair ? low_bits : 0u;
    if (keep_bits.bits != nullptr && part[v] > 0) {
      low_bits &= lane_bits(keep_bits.of(row[0], slot), column + v * kLanes);
      if (pair) high_bits &= lane_bits(keep_bits.of(row[1], slot + 1), column + v * kLanes);
    }
    values[v] = pair_rows(low + v * kLanes, low_bits, high + v * kLanes, high_bits);
  }
}
#endif

// A block of rows of kTileColumns columns side by side: words along the rows, as a panel of B in gemm.inl.
template <class T, class Unit>
void pack_rows_of_slots(int64_t slots, const int32_t* row, int64_t slot, const Matrix<T>& x, const KeepBits& keep_bits,
                        int64_t column, int columns, float* to) {
  int part[kTileVecs];
  for (int v = 0; v < kTileVecs; ++v) part[v] = std::clamp(columns - v * kLanes, 0, kLanes);
  for (int64_t i = 0; i < slots; i += Unit::kPerWord) {
    Vec values[kTileVecs];
    load_rows(Unit{}, x, row + i, slot + i, slots - i, keep_bits, column, part, values);
    for (int v = 0; v < kTileVecs; ++v) store(to + i / Unit::kPerWord * kTileColumns + v * kLanes, values[v]);
    // The next panel reads the neighbouring columns of the same rows, too far apart for the machine to guess.
    for (int k = 0; k < Unit::kPerWord && i + k < slots; ++k) {
      __builtin_prefetch(x.data + row[i + k] * x.stride + column + kTileColumns);
      __builtin_prefetch(x.data + row[i + k] * x.stride + column + kTileColumns + 64 / sizeof(T));
    }
  }
}

// Sums of one block: coefficients are words along the slots, [word][rank].
template <class Unit, int kRanks>
int64_t row_sums_tile(int64_t words, const float* panel, const float* coefficients, int64_t rank, int columns,
                      float* out, int64_t ldo, bool accumulate) {
  Vec sums[kRanks][kTileVecs];
#pragma GCC unroll 16
  for (int j = 0; j < kRanks; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) sums[j][v] = zero();
  }
  for (int64_t w = 0; w < words; ++w) {
    Vec values[kTileVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) values[v] = load(panel + w * kTileColumns + v * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kRanks; ++j) {
      const Vec word = broadcast(coefficients[w * rank + j]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) sums[j][v] = Unit::step(word, values[v], sums[j][v]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kRanks; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) {
      const int part = std::clamp(columns - v * kLanes, 0, kLanes);
      float* const to = out + j * ldo + v * kLanes;
      store_some(to, accumulate ? add(load_some(to, part), sums[j][v]) : sums[j][v], part);
    }
  }
  return kRanks;
}

// Columns [begin, end) of out [rank, ..] for one expert's `slots` rows from `slot` on.
template <class T, class Unit>
void row_sums(int64_t slots, const int32_t* row, int64_t slot, const Matrix<T>& x, const KeepBits& keep_bits,
              const float* coefficients, int64_t rank, int64_t begin, int64_t end, float* out, int64_t ldo) {
  if (slots == 0) {
    for (int64_t j = 0; j < rank; ++j) std::fill(out + j * ldo + begin, out + j * ldo + end, 0.0f);
  }
  alignas(64) float panel[kRowBlock * kTileColumns];
  for (int64_t i = 0; i < slots; i += kRowBlock) {
    const int64_t some = std::min(kRowBlock, slots - i);
    const int64_t words = rank_words(some, Unit::kPerWord);
    const float* const block = coefficients + i / Unit::kPerWord * rank;
    for (int64_t c = begin; c < end; c += kTileColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, end - c));
      pack_rows_of_slots<T, Unit>(some, row + i, slot + i, x, keep_bits, c, columns, panel);
      float* const to = out + c;
      for (int64_t j = 0; j < rank;) {
        const int64_t left = rank - j;
        if (left >= kTileRows && left != kTileRows + 4) {
          j += row_sums_tile<Unit, kTileRows>(words, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        } else if (left >= 8 && kTileRows >= 8) {
          j += row_sums_tile<Unit, 8>(words, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        } else if (left >= 4) {
          j += row_sums_tile<Unit, 4>(words, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        } else if (left >= 2) {
          j += row_sums_tile<Unit, 2>(words, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        } else {
          j += row_sums_tile<Unit, 1>(words, panel, block + j, rank, columns, to + j * ldo, ldo, i > 0);
        }
      }
    }
  }
}
