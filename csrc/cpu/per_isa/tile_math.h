// SPDX-License-Identifier: Apache-2.0
// The passes of ../tile_math.h. Elementwise work is a plain loop that the compiler vectorises, without fused
// multiply-adds, so the bits are the same for every instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../bfloat16.h"
#include "../tile_math.h"
#include "packing.h"
#include "simd.h"

namespace dmole::cpu::DMOLE_ISA {

template <class Step>
double sum_of_rows(int64_t rows, int64_t columns, const Step& step) {
  constexpr int kChains = 4;  // hides the latency of an addition
  double total = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    Vec sums[kChains] = {zero(), zero(), zero(), zero()};
    int64_t c = 0;
    for (; c + kChains * kLanes <= columns; c += kChains * kLanes) {
      for (int i = 0; i < kChains; ++i) sums[i] = step(r, c + i * kLanes, kLanes, sums[i]);
    }
    for (; c < columns; c += kLanes) {
      sums[0] = step(r, c, static_cast<int>(std::min<int64_t>(kLanes, columns - c)), sums[0]);
    }
    total += static_cast<double>(sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
  }
  return total;
}

inline double sum_of_squares(const float* tile, int64_t rows, int64_t columns, int64_t stride) {
  return sum_of_rows(rows, columns, [=](int64_t r, int64_t c, int count, Vec so_far) {
    const Vec value = load_some(tile + r * stride + c, count);
    return multiply_add(value, value, so_far);
  });
}

inline double sum_of_products(const float* a, const float* b, int64_t rows, int64_t columns, int64_t stride) {
  return sum_of_rows(rows, columns, [=](int64_t r, int64_t c, int count, Vec so_far) {
    const int64_t at = r * stride + c;
    return multiply_add(load_some(a + at, count), load_some(b + at, count), so_far);
  });
}

template <class T>
void bias_relu(const float* __restrict sums, const void* bias, int64_t rows, int64_t columns, int64_t stride,
               void* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const float shift = to_float(static_cast<const T*>(bias)[r]);
    const float* __restrict from = sums + r * stride;
    T* __restrict row = static_cast<T*>(to) + r * stride;
    for (int64_t c = 0; c < columns; ++c) {
      const float value = from[c] + shift;
      row[c] = from_float<T>(value < 0.0f ? 0.0f : value);  // a NaN stays one
    }
  }
}

// 1 / (1 + exp(x)) for x = -value and exp(x) = 2^n exp(r), |r| <= ln(2) / 2, with the polynomial of Cephes' expf.
inline float sigmoid_of(float value) {
  float x = -value;
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  // Added to this, a float rounds to an integer, found in the lowest bits.
  constexpr float kRounder = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return 1.0f / (1.0f + p * power);
}

template <class T, bool kSigmoid>
void squared_error_of(const float* sums, const T* bias, const T* target, int64_t rows, int64_t columns, int64_t stride,
                      float* __restrict error) {
  for (int64_t r = 0; r < rows; ++r) {
    const float shift = to_float(bias[r]);
    const float* __restrict from = sums + r * stride;
    const T* __restrict wanted = target + r * stride;
    for (int64_t c = 0; c < columns; ++c) {
      const float value = from[c] + shift;
      const float difference = (kSigmoid ? sigmoid_of(value) : value) - to_float(wanted[c]);
      error[c] += difference * difference;
    }
  }
}

template <class T>
void squared_error(const float* sums, const void* bias, const void* target, bool sigmoid, int64_t rows, int64_t columns,
                   int64_t stride, float* error) {
  const auto run = sigmoid ? squared_error_of<T, true> : squared_error_of<T, false>;
  run(sums, static_cast<const T*>(bias), static_cast<const T*>(target), rows, columns, stride, error);
}

template <class T>
void max_pool(const void* from, const uint8_t* mask, int64_t mask_stride, int64_t tokens, int64_t columns,
              int64_t stride, void* values, int64_t* token) {
  constexpr int64_t kBlock = 256;
  float best[kBlock];
  int32_t place[kBlock];
  for (int64_t c0 = 0; c0 < columns; c0 += kBlock) {
    const int64_t count = std::min(kBlock, columns - c0);
    std::fill_n(best, count, -std::numeric_limits<float>::infinity());
    std::fill_n(place, count, 0);
    for (int64_t t = 0; t < tokens; ++t) {
      if (mask[t * mask_stride] == 0) continue;
      const T* row = static_cast<const T*>(from) + t * stride + c0;
      for (int64_t c = 0; c < count; ++c) {
        const float value = to_float(row[c]);
        // The second half: a NaN replaces any number, and nothing replaces it.
        const bool better = (value > best[c]) | ((value != value) & (best[c] == best[c]));
        best[c] = better ? value : best[c];
        place[c] = better ? static_cast<int32_t>(t) : place[c];
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      static_cast<T*>(values)[c0 + c] = from_float<T>(best[c]);
      token[c0 + c] = place[c];
    }
  }
}

const TileMath kTileMath = {
    sum_of_squares,
    sum_of_products,
    {bias_relu<float>, bias_relu<bfloat16>},
    {squared_error<float>, squared_error<bfloat16>},
    {max_pool<float>, max_pool<bfloat16>},
};

}  // namespace dmole::cpu::DMOLE_ISA
