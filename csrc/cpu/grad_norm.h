// SPDX-License-Identifier: Apache-2.0
// Norms and sums of a linear's weight gradient G^T X, from its input x and output gradient g.
//
//   direct   sum((G^T X)^2), tile by tile: a tile stays in the cache and is not written to memory
//   ghost    sum_{t,t'} (x_t . x_t') (g_t . g_t'), tiles on and above the diagonal
//   sketch   Y += (G L)^T (X R)
//
// Tiles and the order of their sums follow from the shape of a sample alone, so a result depends neither on the number
// of threads nor on the other samples.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace dmole::cpu {

enum class NormMethod { automatic, direct, ghost };

// A matrix of rows with contiguous elements; `sample` separates samples where there are several.
template <class T>
struct Rows {
  const T* data;
  int64_t columns;
  int64_t row;
  int64_t sample;
};

// The cheaper of direct and ghost for one sample.
NormMethod cheaper_method(int64_t tokens, int64_t in_features, int64_t out_features);

// squares[b] = ||G_b^T X_b||_F^2. Tokens before the first and after the last with a gradient (padding) are not read,
// and `automatic` selects the method for the remaining tokens of each sample.
template <class T>
void squared_norms(const ParallelFor& parallel_for, NormMethod method, int64_t samples, int64_t tokens,
                   const Rows<T>& x, const Rows<T>& grad, float* squares);

// buffer [out_features, in_features] += G^T X.
template <class T>
void accumulate_gradient(const ParallelFor& parallel_for, int64_t rows, const Rows<T>& x, const Rows<T>& grad,
                         float* buffer);

// sketch [k, l] += (G L)^T (X R); left [out_features, k] and right [in_features, l] are contiguous, and so is the work
// memory: `shrunk_grad` [rows, k], `shrunk_x` [rows, l].
template <class T>
void accumulate_sketch(const ParallelFor& parallel_for, int64_t rows, const Rows<T>& x, const Rows<T>& grad,
                       const float* left, int64_t k, const float* right, int64_t l, float* shrunk_grad, float* shrunk_x,
                       float* sketch);

}  // namespace dmole::cpu
