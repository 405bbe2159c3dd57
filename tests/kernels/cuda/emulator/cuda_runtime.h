// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as the kernels of csrc/cuda need, on the host: they compile as C++ with this folder in the include
// path, and run thread by thread. Threads of a block are fibers on one thread of the host. A fiber runs until it waits,
// at a barrier or in a warp function, so what a missing barrier lets happen does happen, in an order that the test
// chooses; what would hang or be undefined on a GPU is an error that says where.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __launch_bounds__(threads)
// Blocks run one after another, and each finds what the one before left.
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Those of the fiber that runs.
extern dim3 threadIdx, blockIdx;

namespace emulator {

cudaError_t launch(const dim3& grid, const dim3& block, const std::function<void()>& thread);

void wait_for_block(int line);

// Waits for the lanes of the mask; gives what each of them brought, by lane.
const uint64_t* exchange(unsigned mask, uint64_t value, int line);

// The value of a lane, which must be one of the mask's.
uint64_t value_of(const uint64_t* values, unsigned mask, int lane, int line);

int lane();

template <class T>
T shuffle(unsigned mask, T value, int from, int line) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = value_of(exchange(mask, bits, line), mask, from, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulator::launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
}

inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait_for_block(line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, from, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, emulator::lane() ^ distance, line);
}

// A lane without one below it keeps its own value, as on a GPU.
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  const int lane = emulator::lane();
  return emulator::shuffle(mask, value, lane >= distance ? lane - distance : lane, line);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate, int line = __builtin_LINE()) {
  const uint64_t* values = emulator::exchange(mask, predicate ? 1u : 0u, line);
  unsigned met = 0u;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0u && values[lane] != 0u) met |= 1u << lane;
  }
  return met;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
