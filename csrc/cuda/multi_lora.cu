// SPDX-License-Identifier: Apache-2.0
// y = base + sum_e gate_e scale_e (x A_e^T) B_e^T for the 1 to 16 rows of a decode step, in two launches.
//
// The order of a row's sums does not depend on the other rows or on the alignment of operands, so its result has the
// same bits in any batch. Experts are read in place, and only those with a gate that is not zero.
#include "elements.cuh"
#include "multi_lora.h"

namespace dmole::cuda {

namespace {

constexpr int kShrinkThreads = 128;
constexpr int kShrinkWarps = kShrinkThreads / kWarp;
// Small, so that the outputs of one row are spread over all multiprocessors.
constexpr int kExpandThreads = 64;

__device__ inline float gate_of(const DecodeCall& call, int64_t row, int64_t expert) {
  return call.gate[row / (call.rows / call.gates) * call.experts + expert];
}

__device__ inline int64_t field(const DecodeCall& call, ColumnField name, int64_t column) {
  return call.columns[name * call.ranks + column];
}

__device__ inline bool has(unsigned rows, int row) { return (rows >> row) & 1u; }

// S[:, j] = x . A[j] for the rows that need column j, zero for the others. A block per column: A[j] is read once for
// all rows, each warp processes every fourth chunk of it, and the sums of the warps are added in order.
template <class T, class W>
__global__ void __launch_bounds__(kShrinkThreads) shrink(const DecodeCall call) {
  __shared__ float partial[kShrinkWarps][kMostRows];
  const int64_t column = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t expert = field(call, kExpert, column);
  const unsigned needing = __ballot_sync(kWholeWarp, lane < call.rows && gate_of(call, lane, expert) != 0.0f);
  float sum[kMostRows] = {};
  if (needing != 0u) {
    const W* a = reinterpret_cast<const W*>(field(call, kAddressA, column));
    const T* x = static_cast<const T*>(call.x);
    const bool x_aligned = reinterpret_cast<uintptr_t>(x) % kLoadBytes == 0 &&
                           call.x_step * static_cast<int64_t>(sizeof(T)) % kLoadBytes == 0;
    for (int64_t d = thread * kChunk; d < call.features; d += kShrinkThreads * kChunk) {
      float a_chunk[kChunk];
      load_chunk(a + d, call.features - d, call.a_aligned != 0, a_chunk);
#pragma unroll
      for (int row = 0; row < kMostRows; ++row) {
        if (!has(needing, row)) continue;
        float x_chunk[kChunk];
        load_chunk(x + row * call.x_step + d, call.features - d, x_aligned, x_chunk);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum[row] = fmaf(a_chunk[i], x_chunk[i], sum[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < kMostRows; ++row) {
      if (!has(needing, row)) continue;
      const float total = warp_sum(sum[row]);
      if (lane == 0) partial[warp][row] = total;
    }
  }
  __syncthreads();
  if (thread < call.rows) {
    float total = 0.0f;
    if (has(needing, thread)) {
#pragma unroll
      for (int w = 0; w < kShrinkWarps; ++w) total += partial[w][thread];
    }
    static_cast<T*>(call.s)[thread * call.ranks + column] = from_float<T>(total);
  }
}

// scale sum_j S[row, j] B[output, j] over one expert's columns, in their order.
template <class T, class W>
__device__ inline float expert_output(const DecodeCall& call, int64_t row, int64_t output, int64_t expert) {
  const int64_t first = call.spans[2 * expert], rank = call.spans[2 * expert + 1];
  if (rank == 0 || output >= call.outputs) return 0.0f;
  const T* s = static_cast<const T*>(call.s) + row * call.ranks;
  const int64_t offset = output * field(call, kStepB, first);
  float sum = 0.0f;
  if (call.b_aligned != 0) {
    constexpr int kCount = kLoadBytes / sizeof(W);
    for (int64_t j = first; j < first + rank; j += kCount) {
      float b[kCount];
      load_aligned(reinterpret_cast<const W*>(field(call, kAddressB, j)) + offset, b);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum = fmaf(to_float(s[j + i]), b[i], sum);
    }
  } else {
    for (int64_t j = first; j < first + rank; ++j) {
      const W* b = reinterpret_cast<const W*>(field(call, kAddressB, j)) + offset;
      sum = fmaf(to_float(s[j]), to_float(*b), sum);
    }
  }
  return static_cast<float>(__longlong_as_double(field(call, kScale, first))) * sum;
}

// y = base + (S * C) B^T. A thread per output of a row; a warp reads the gates of 32 experts at once and processes
// those that are not zero, in order.
template <class T, class W>
__global__ void __launch_bounds__(kExpandThreads) expand(const DecodeCall call) {
  const int64_t row = blockIdx.y;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kExpandThreads + threadIdx.x;
  const int lane = threadIdx.x % kWarp;
  float delta = 0.0f;
  for (int64_t begin = 0; begin < call.experts; begin += kWarp) {
    const float gate = begin + lane < call.experts ? gate_of(call, row, begin + lane) : 0.0f;
    for (unsigned open = __ballot_sync(kWholeWarp, gate != 0.0f); open != 0u; open &= open - 1u) {
      const int place = __ffs(static_cast<int>(open)) - 1;
      const float factor = __shfl_sync(kWholeWarp, gate, place);
      delta = fmaf(factor, expert_output<T, W>(call, row, output, begin + place), delta);
    }
  }
  if (output >= call.outputs) return;
  if (call.base != nullptr) delta += to_float(static_cast<const T*>(call.base)[row * call.base_step + output]);
  static_cast<T*>(call.y)[row * call.outputs + output] = from_float<T>(delta);
}

template <class T, class W>
cudaError_t launch(const DecodeCall& call, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  if (call.ranks > 0) {
    config.gridDim = dim3(static_cast<unsigned>(call.ranks));
    config.blockDim = dim3(kShrinkThreads);
    const cudaError_t error = cudaLaunchKernelEx(&config, shrink<T, W>, call);
    if (error != cudaSuccess) return error;
  }
  if (call.outputs == 0) return cudaSuccess;
  const int64_t blocks = (call.outputs + kExpandThreads - 1) / kExpandThreads;
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(call.rows));
  config.blockDim = dim3(kExpandThreads);
  return cudaLaunchKernelEx(&config, expand<T, W>, call);
}

template <class T>
cudaError_t launch_with_experts(const DecodeCall& call, cudaStream_t stream) {
  if (call.expert_type == kFloat) return launch<T, float>(call, stream);
  return call.expert_type == call.type ? launch<T, T>(call, stream) : cudaErrorInvalidValue;
}

}  // namespace

}  // namespace dmole::cuda

extern "C" int dmole_cuda_decode(const dmole::cuda::DecodeCall* call, void* stream) {
  using namespace dmole::cuda;
  if (call->rows == 0) return cudaSuccess;
  if (call->rows < 0 || call->rows > kMostRows || call->gates < 1 || call->rows % call->gates != 0) {
    return cudaErrorInvalidValue;
  }
  const auto on = static_cast<cudaStream_t>(stream);
  switch (call->type) {
    case kFloat:
      return launch_with_experts<float>(*call, on);
    case kHalf:
      return launch_with_experts<__half>(*call, on);
    case kBFloat16:
      return launch_with_experts<__nv_bfloat16>(*call, on);
    default:
      return cudaErrorInvalidValue;
  }
}
