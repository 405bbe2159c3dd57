// SPDX-License-Identifier: Apache-2.0
// A stable counting sort of (expert, row) pairs: count, scan, scatter. No atomics: a pair's place is the number of
// pairs before it, which ballots count within a tile of 32 rows and a scan over the tiles, so two runs are the same.
#include <limits>

#include "cpu/row_map.h"
#include "elements.cuh"
#include "row_map.h"

namespace dmole::cuda {

namespace {

static_assert(kTileRows == kWarp, "a warp per tile, a lane per row");
constexpr int kTileThreads = 128;
constexpr int kTilesABlock = kTileThreads / kWarp;
constexpr int kScanThreads = 1024;
constexpr int kHeader = 3;

// The gates of a row; null past the last one.
__device__ inline const float* gates_of(const RowMapCall& call, int64_t row) {
  return row < call.rows ? call.gate + row / (call.rows / call.gates) * call.experts : nullptr;
}

__device__ inline bool meets(const float* gates, int64_t expert) { return gates != nullptr && gates[expert] != 0.0f; }

__device__ inline int64_t tile_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kTilesABlock + threadIdx.x / kWarp;
}

// counts[e, tile] and the tile's bits of needed.
__global__ void __launch_bounds__(kTileThreads) count_rows(const RowMapCall call, int64_t tiles) {
  const int64_t tile = tile_of_warp();
  if (tile >= tiles) return;
  const int lane = threadIdx.x % kWarp;
  const float* gates = gates_of(call, tile * kTileRows + lane);
  const int64_t needed_words = (call.experts + kWarp - 1) / kWarp;
  for (int64_t begin = 0; begin < call.experts; begin += kWarp) {
    unsigned bits = 0u;
    for (int i = 0; i < kWarp && begin + i < call.experts; ++i) {
      const unsigned met = __ballot_sync(kWholeWarp, meets(gates, begin + i));
      if (met != 0u) bits |= 1u << i;
      if (lane == 0) call.counts[(begin + i) * tiles + tile] = __popc(met);
    }
    if (lane == 0) call.needed[tile * needed_words + begin / kWarp] = bits;
  }
}

// The sum of the lanes up to this one.
__device__ inline int32_t inclusive_sum(int32_t value, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t before = __shfl_up_sync(kWholeWarp, value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

// Replaces `count` numbers by the sums of those before them (with `itself`: and of itself); returns the sum of all.
__device__ inline int32_t scan(int32_t* numbers, int64_t count, int lane, bool itself) {
  int32_t total = 0;
  for (int64_t begin = 0; begin < count; begin += kWarp) {
    const bool there = begin + lane < count;
    const int32_t value = there ? numbers[begin + lane] : 0;
    const int32_t sum = inclusive_sum(value, lane);
    if (there) numbers[begin + lane] = total + sum - (itself ? 0 : value);
    total += __shfl_sync(kWholeWarp, sum, kWarp - 1);
  }
  return total;
}

// counts[e, tile] becomes the number of e's rows in earlier tiles; header and start are written. One block: a warp per
// expert, then one warp over the experts.
__global__ void __launch_bounds__(kScanThreads) place_experts(const RowMapCall call, int64_t tiles) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t* start = call.table + kHeader;
  for (int64_t e = warp; e < call.experts; e += kScanThreads / kWarp) {
    const int32_t rows = scan(call.counts + e * tiles, tiles, lane, false);
    if (lane == 0) start[e + 1] = rows;
  }
  __syncthreads();
  if (warp != 0) return;
  const int32_t pairs = scan(start + 1, call.experts, lane, true);
  if (lane == 0) {
    start[0] = 0;
    call.table[0] = static_cast<int32_t>(call.rows);
    call.table[1] = static_cast<int32_t>(call.experts);
    call.table[2] = pairs;
  }
}

// Each pair to its pair.
__global__ void __launch_bounds__(kTileThreads) fill_pairs(const RowMapCall call, int64_t tiles) {
  const int64_t tile = tile_of_warp();
  if (tile >= tiles) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = tile * kTileRows + lane;
  const int32_t* start = call.table + kHeader;
  int32_t* rows = call.table + kHeader + call.experts + 1;
  int32_t* flags = rows + call.table[2];
  const float* gates = gates_of(call, row);
  int64_t last = call.experts - 1;
  while (last > 0 && !meets(gates, last)) --last;
  int32_t first = dmole::cpu::kFirst;
  for (int64_t e = 0; e < call.experts; ++e) {
    const bool met = meets(gates, e);
    const unsigned lanes = __ballot_sync(kWholeWarp, met);
    if (!met) continue;
    const int64_t pair = int64_t{start[e]} + call.counts[e * tiles + tile] + __popc(lanes & ((1u << lane) - 1u));
    rows[pair] = static_cast<int32_t>(row);
    flags[pair] = first | (e == last ? dmole::cpu::kLast : 0);
    first = 0;
  }
}

}  // namespace

}  // namespace dmole::cuda

extern "C" int dmole_cuda_row_map(const dmole::cuda::RowMapCall* call, void* stream) {
  using namespace dmole::cuda;
  const bool whole = call->gates == 0 ? call->rows == 0 : call->rows >= 0 && call->rows % call->gates == 0;
  if (!whole || call->experts < 1 || call->rows * call->experts > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  const int64_t tiles = row_map_tiles(call->rows);
  const dim3 grid(static_cast<unsigned>((tiles + kTilesABlock - 1) / kTilesABlock));
  cudaLaunchConfig_t config = {};
  config.stream = static_cast<cudaStream_t>(stream);
  config.gridDim = grid;
  config.blockDim = dim3(kTileThreads);
  cudaError_t error = tiles > 0 ? cudaLaunchKernelEx(&config, count_rows, *call, tiles) : cudaSuccess;
  if (error != cudaSuccess) return error;
  config.gridDim = dim3(1);
  config.blockDim = dim3(kScanThreads);
  error = cudaLaunchKernelEx(&config, place_experts, *call, tiles);
  if (error != cudaSuccess || tiles == 0) return error;
  config.gridDim = grid;
  config.blockDim = dim3(kTileThreads);
  return cudaLaunchKernelEx(&config, fill_pairs, *call, tiles);
}
