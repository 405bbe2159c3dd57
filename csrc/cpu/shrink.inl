// SPDX-License-Identifier: Apache-2.0
// out[i, j] = sum_k x[row_i, k] w[j, k]: the long products (S = x^ A^T, P = dY B), both operands contiguous along k and
// read as they lie. A register holds kLanes partial sums of one element, added up at the end of each block of k.
// Included inside a level's namespace.

constexpr int kDotColumns = 4;
// A block of k: a lane adds 64 products, and the rows of x in a tile stay in the first-level cache.
constexpr int64_t kDotWords = 64 * kLanes;

template <class T, class Unit, int kRows, bool kMasked>
void dot_tile(int64_t elements, const T* const* x, const uint16_t* const* bits, int64_t column, const T* const* w,
              float* const* out, int columns, bool accumulate) {
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
    for (int j = 0; j < kDotColumns; ++j) weights[j] = Unit::along_k(w[j] + k, kLanes, kStep);
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
    for (int j = 0; j < kDotColumns; ++j) {
      if (j < columns) out[i][j] = accumulate ? out[i][j] + sum(sums[i][j]) : sum(sums[i][j]);
    }
  }
}

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
};

// Rows row[0 .. count) of x with weights w [rank, elements] into out [count, rank].
template <class T, class Unit, int kRows>
void shrink_rows(const Matrix<T>& x, const int32_t* row, const KeepBits& keep_bits, int64_t slot,
                 const WeightRows<T>& w, int64_t rank, int64_t elements, float* out) {
  const T* from[kRows];
  const uint16_t* bits[kRows];
  for (int64_t k = 0; k == 0 || k < elements; k += kDotWords * Unit::kPerWord) {
    const int64_t part = std::min<int64_t>(kDotWords * Unit::kPerWord, elements - k);
    for (int i = 0; i < kRows; ++i) {
      from[i] = x.data + row[i] * x.stride + k;
      bits[i] = keep_bits.bits == nullptr ? nullptr : keep_bits.of(row[i], slot + i);
    }
    for (int64_t j = 0; j < rank; j += kDotColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kDotColumns, rank - j));
      const T* weights[kDotColumns];
      float* to[kRows];
      for (int c = 0; c < kDotColumns; ++c) weights[c] = w.rows + (j + std::min(c, columns - 1)) * w.stride + k;
      for (int i = 0; i < kRows; ++i) to[i] = out + i * rank + j;
      if (keep_bits.bits == nullptr) {
        dot_tile<T, Unit, kRows, false>(part, from, bits, k, weights, to, columns, k > 0);
      } else {
        dot_tile<T, Unit, kRows, true>(part, from, bits, k, weights, to, columns, k > 0);
      }
    }
  }
}

template <class T, class Unit>
void shrink(const Matrix<T>& x, const int32_t* row, int64_t count, const KeepBits& keep_bits, int64_t slot,
            const WeightRows<T>& w, int64_t rank, int64_t elements, float* out) {
  int64_t i = 0;
  for (; i + kDotRows <= count; i += kDotRows) {
    shrink_rows<T, Unit, kDotRows>(x, row + i, keep_bits, slot + i, w, rank, elements, out + i * rank);
  }
  for (; i + 2 <= count; i += 2) {
    shrink_rows<T, Unit, 2>(x, row + i, keep_bits, slot + i, w, rank, elements, out + i * rank);
  }
  for (; i < count; ++i) {
    shrink_rows<T, Unit, 1>(x, row + i, keep_bits, slot + i, w, rank, elements, out + i * rank);
  }
}
