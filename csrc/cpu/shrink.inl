// SPDX-License-Identifier: Apache-2.0
// out[i, j] = sum_k x[row_i, k] w[j, k]: the long products (S = x^ A^T, P = dY B), both operands contiguous along k and
// read as they lie. A register holds kLanes partial sums of one element, added up at the end of each block of k.
// Included inside a level's namespace.

constexpr int kDotColumns = 4;
// A block of k: a lane adds 64 products, and the rows of x in a tile stay in the first-level cache.
constexpr int64_t kDotWords = 64 * kLanes;

// How a tile meets its operands: dropout's mask on x, or asking for weights that no cache holds yet, `ahead` elements
// from its own: those of its columns that have a bit in `turns`.
enum class Dot { plain, masked, cold };

template <class T, class Unit, int kRows, Dot kDot>
void dot_tile(int64_t elements, const T* const* x, const uint16_t* const* bits, int64_t column, const T* const* w,
              int64_t ahead, unsigned turns, float* const* out, int columns, bool accumulate) {
  constexpr bool kMasked = kDot == Dot::masked;
  constexpr int kStep = kLanes * Unit::kPerWord;
  Vec sums[kRows][kDotColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) sums[i][j] = zero();
  }
  int64_t k = 0;
  for (; k + kStep <= elements; k += kStep) {
    Vec weights[kDotColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) {
      weights[j] = Unit::along_k(w[j] + k, kLanes, kStep);
      if (kDot == Dot::cold && (turns >> j & 1u) != 0) __builtin_prefetch(w[j] + k + ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec value =
          kMasked ? Unit::kept_along_k(x[i] + k, bits[i], column + k) : Unit::along_k(x[i] + k, kLanes, kStep);
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) sums[i][j] = Unit::step(value, weights[j], sums[i][j]);
    }
  }
  if (k < elements) {
    // The tail goes through a zeroed copy: one step like the others.
    const int64_t left = elements - k;
    const int words = static_cast<int>((left + Unit::kPerWord - 1) / Unit::kPerWord);
    for (int i = 0; i < kRows; ++i) {
      Vec value = Unit::along_k(x[i] + k, words, left);
      if (kMasked) {
        T copy[kStep] = {};
        std::copy_n(x[i] + k, left, copy);
        value = Unit::kept_along_k(copy, bits[i], column + k);
      }
      for (int j = 0; j < kDotColumns; ++j) {
        sums[i][j] = Unit::step(value, Unit::along_k(w[j] + k, words, left), sums[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    float total[kDotColumns];
    store_sums(total, sums[i]);
    for (int j = 0; j < columns; ++j) out[i][j] = accumulate ? out[i][j] + total[j] : total[j];
  }
}

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
};

// Rows row[0 ..] of x with weights w [rank, elements] into out [.., rank].
template <class T>
struct Shrink {
  Matrix<T> x;
  const int32_t* row;
  KeepBits keep_bits;
  int64_t slot;
  WeightRows<T> w;
  int64_t rank, elements;
  float* out;
  int64_t next = 0;  // from a weight to the one in its place at the next call, if there is one, in elements
};

// Its rows [first, first + kRows).
template <class T, class Unit, int kRows, Dot kDot>
void shrink_rows(const Shrink<T>& call, int64_t first, unsigned turns) {
  const int64_t ahead = call.next == 0 ? kDotColumns * call.w.stride : call.next;
  const T* from[kRows];
  const uint16_t* bits[kRows];
  const int32_t* const row = call.row + first;
  for (int64_t k = 0; k == 0 || k < call.elements; k += kDotWords * Unit::kPerWord) {
    const int64_t part = std::min<int64_t>(kDotWords * Unit::kPerWord, call.elements - k);
    for (int i = 0; i < kRows; ++i) {
      from[i] = call.x.data + row[i] * call.x.stride + k;
      bits[i] = kDot == Dot::masked ? call.keep_bits.of(row[i], call.slot + first + i) : nullptr;
    }
    for (int64_t j = 0; j < call.rank; j += kDotColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kDotColumns, call.rank - j));
      const T* weights[kDotColumns];
      float* to[kRows];
      for (int c = 0; c < kDotColumns; ++c) {
        weights[c] = call.w.rows + (j + std::min(c, columns - 1)) * call.w.stride + k;
      }
      for (int i = 0; i < kRows; ++i) to[i] = call.out + (first + i) * call.rank + j;
      dot_tile<T, Unit, kRows, kDot>(part, from, bits, k, weights, ahead, turns, to, columns, k > 0);
    }
  }
}

// Its rows [i, i + count) with the smallest tile that holds them, of at most kRows.
template <class T, class Unit, int kRows, Dot kDot>
void shrink_some(const Shrink<T>& call, int64_t i, int64_t count, unsigned turns = 0) {
  if constexpr (kRows > 0) {
    if (count < kRows) return shrink_some<T, Unit, kRows - 1, kDot>(call, i, count, turns);
    shrink_rows<T, Unit, kRows, kDot>(call, i, turns);
  }
}

template <class T, class Unit, Dot kDot>
void shrink_all(const Shrink<T>& call, int64_t count) {
  // Tiles of about the same size: a small last one would wait for the weights as long as a large one.
  const int64_t tiles = (count + kDotRows - 1) / kDotRows, step = (count + tiles - 1) / std::max<int64_t>(1, tiles);
  for (int64_t i = 0, tile = 0; i < count; i += step, ++tile) {
    const int64_t some = std::min(step, count - i);
    // The first rows bring this call's weights into the caches; for the next call's all rows take turns, so that memory
    // is never idle.
    unsigned turns = call.next == 0 && tile == 0 ? ~0u : 0u;
    for (int64_t j = tile; call.next != 0 && j < kDotColumns; j += tiles) turns |= 1u << j;
    if (kDot == Dot::cold && turns == 0) {
      shrink_some<T, Unit, kDotRows, Dot::plain>(call, i, some);
    } else {
      shrink_some<T, Unit, kDotRows, kDot>(call, i, some, turns);
    }
  }
}

template <class T, class Unit>
void shrink(const Shrink<T>& call, int64_t count) {
  if (call.keep_bits.bits == nullptr) {
    shrink_all<T, Unit, Dot::cold>(call, count);
  } else {
    shrink_all<T, Unit, Dot::masked>(call, count);
  }
}
