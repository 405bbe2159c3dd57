// SPDX-License-Identifier: Apache-2.0
// Common functions of the kernels: elements as floats, loads of contiguous elements, the sum of a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dmole::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kLoadBytes = 16;  // the widest load of a thread
constexpr int kChunk = 8;       // contiguous elements that a thread processes at a time

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
  return value;
}

template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// kLoadBytes of neighbours from an address that is a multiple of kLoadBytes.
template <class T>
__device__ inline void load_aligned(const T* from, float* into) {
  constexpr int kCount = kLoadBytes / sizeof(T);
  alignas(kLoadBytes) T some[kCount];
  *reinterpret_cast<uint4*>(some) = *reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) into[i] = to_float(some[i]);
}

// A chunk with `left` elements and zeros after them. `aligned` changes the loads only, not the result.
template <class T>
__device__ inline void load_chunk(const T* from, int64_t left, bool aligned, float (&into)[kChunk]) {
  if (aligned && left >= kChunk) {
    constexpr int kCount = kLoadBytes / sizeof(T);
#pragma unroll
    for (int i = 0; i < kChunk; i += kCount) load_aligned(from + i, into + i);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) into[i] = i < left ? to_float(from[i]) : 0.0f;
  }
}

// The same order of additions in every lane, so the same bits.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

}  // namespace dmole::cuda
