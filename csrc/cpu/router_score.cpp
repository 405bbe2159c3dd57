// SPDX-License-Identifier: Apache-2.0
#include "router_score.h"

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "scratch.h"

namespace dmole::cpu {

namespace {

constexpr int64_t kSamples = 192;   // of a tile at most: the weights are read once for all of them
constexpr int64_t kAlignment = 32;  // samples of a tile are a multiple of this
constexpr int64_t kFeatures = 192;  // of a reconstruction at a time; its block stays in the second-level cache
constexpr int64_t kFloatSums = 16;  // squared errors added in float before they go into a double
constexpr int64_t kTransposed = 16;

// to(d, n) = from(n, d), zeros for the samples that do not exist.
template <class T>
void transpose_rows(int64_t samples, int64_t tile, const T* from, int64_t row, int64_t features, T* to) {
  for (int64_t d0 = 0; d0 < features; d0 += kTransposed) {
    const int64_t some = std::min(kTransposed, features - d0);
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t d = 0; d < some; ++d) to[(d0 + d) * tile + n] = from[n * row + d0 + d];
    }
    for (int64_t d = 0; d < some; ++d) std::fill_n(to + (d0 + d) * tile + samples, tile - samples, from_float<T>(0.0f));
  }
}

template <class T>
void score_tile(int64_t samples, int64_t tile, const T* features, const Autoencoders<T>& all, int64_t task, T* error) {
  constexpr int kNarrow = sizeof(T) == sizeof(bfloat16);
  const TileMath& math = kernels().tile_math;
  const int64_t hidden = all.hidden, width = all.width;
  const int64_t sums_size = std::max(hidden, kFeatures) * tile;
  float* const sums = scratch(Scratch::router, sums_size + hidden * tile + tile);
  T* const activation = reinterpret_cast<T*>(sums + sums_size);
  float* const part = sums + sums_size + hidden * tile;
  gemm(hidden, samples, width, all.encoder_weight + task * hidden * width, width, 1, features, tile, 1, sums, tile,
       false);
  math.bias_relu[kNarrow](sums, all.encoder_bias + task * hidden, hidden, samples, tile, activation);
  double total[kSamples] = {};
  for (int64_t d = 0; d < width; d += kFeatures) {
    const int64_t some = std::min(kFeatures, width - d);
    gemm(some, samples, hidden, all.decoder_weight + (task * width + d) * hidden, hidden, 1, activation, tile, 1, sums,
         tile, false);
    for (int64_t r = 0; r < some; r += kFloatSums) {
      std::fill_n(part, samples, 0.0f);
      math.squared_error[kNarrow](sums + r * tile, all.decoder_bias + task * width + d + r, features + (d + r) * tile,
                                  all.sigmoid, std::min(kFloatSums, some - r), samples, tile, part);
      for (int64_t n = 0; n < samples; ++n) total[n] += static_cast<double>(part[n]);
    }
  }
  for (int64_t n = 0; n < samples; ++n) {
    error[n * all.tasks + task] = from_float<T>(static_cast<float>(total[n] / static_cast<double>(width)));
  }
}

}  // namespace

int64_t router_tile(int64_t samples) {
  return std::clamp((samples + kAlignment - 1) / kAlignment * kAlignment, kAlignment, kSamples);
}

template <class T>
void router_score(const ParallelFor& parallel_for, int64_t samples, const T* features, int64_t feature_row,
                  const Autoencoders<T>& all, T* transposed, T* error) {
  const int64_t tile = router_tile(samples), tiles = (samples + tile - 1) / tile;
  const auto in_tile = [&](int64_t i) { return std::min(tile, samples - i * tile); };
  parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      transpose_rows(in_tile(i), tile, features + i * tile * feature_row, feature_row, all.width,
                     transposed + i * tile * all.width);
    }
  });
  // All tasks of one tile before the next tile, so that the tile's features stay in the cache.
  parallel_for(tiles * all.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / all.tasks;
      score_tile(in_tile(i), tile, transposed + i * tile * all.width, all, item % all.tasks,
                 error + i * tile * all.tasks);
    }
  });
}

template void router_score<float>(const ParallelFor&, int64_t, const float*, int64_t, const Autoencoders<float>&,
                                  float*, float*);
template void router_score<bfloat16>(const ParallelFor&, int64_t, const bfloat16*, int64_t,
                                     const Autoencoders<bfloat16>&, bfloat16*, bfloat16*);

void router_select(int64_t samples, int64_t tasks, const float* error, const float* threshold, int64_t top_k,
                   float* gate) {
  std::vector<int64_t> best;
  for (int64_t n = 0; n < samples; ++n) {
    const float* const row = error + n * tasks;
    best.clear();
    for (int64_t t = 0; t < tasks; ++t) {
      if (!(row[t] <= threshold[t])) continue;
      // Of equal errors the earlier task is first.
      const auto place = std::upper_bound(best.begin(), best.end(), t,
                                          [row](int64_t left, int64_t right) { return row[left] < row[right]; });
      if (place - best.begin() >= top_k) continue;
      best.insert(place, t);
      if (static_cast<int64_t>(best.size()) > top_k) best.pop_back();
    }
    std::fill_n(gate + n * tasks, tasks, 0.0f);
    for (const int64_t t : best) gate[n * tasks + t] = 1.0f;
  }
}

}  // namespace dmole::cpu
