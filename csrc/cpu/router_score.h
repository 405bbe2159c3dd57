// SPDX-License-Identifier: Apache-2.0
//   error[n, t] = mean_d (f(Wd[t] relu(We[t] z[n] + be[t]) + bd[t])_d - z[n, d])^2        f sigmoid or identity
//
// Applies all autoencoders to one tile of samples at a time. Everything is computed transposed, with the samples of a
// tile contiguous: the stacked weights are then read in place, a bias is one number per row, and errors are summed
// without sums across lanes. Only one block of a reconstruction exists at a time.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace dmole::cpu {

template <class T>
struct Autoencoders {
  int64_t tasks, hidden, width;
  const T* encoder_weight;  // [tasks, hidden, width]
  const T* encoder_bias;    // [tasks, hidden]
  const T* decoder_weight;  // [tasks, width, hidden]
  const T* decoder_bias;    // [tasks, width]
  bool sigmoid;
};

// Samples of a tile. router_score needs `samples` rounded up to tiles, times width, elements of work memory.
int64_t router_tile(int64_t samples);

// error [samples, tasks]; features [samples, width], rows `feature_row` apart; `transposed` is the work memory.
template <class T>
void router_score(const ParallelFor& parallel_for, int64_t samples, const T* features, int64_t feature_row,
                  const Autoencoders<T>& autoencoders, T* transposed, T* error);

// gate[n, t] = 1 if error[n, t] <= threshold[t] and fewer than top_k such tasks precede it by (error, t), else 0.
void router_select(int64_t samples, int64_t tasks, const float* error, const float* threshold, int64_t top_k,
                   float* gate);

}  // namespace dmole::cpu
