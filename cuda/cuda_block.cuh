#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "active_set_block.cuh"

namespace tacext::cuda {

/// The Block policy (see active_set_block.cuh) of a CUDA thread block; a group is a warp.
///
/// Reductions take a fixed tree, so that a class's bits depend on nothing but its problem.
template <int kThreads>
class CudaBlock {
 public:
  __device__ std::int64_t thread() const { return threadIdx.x; }
  __device__ std::int64_t threads() const { return kThreads; }
  __device__ std::int64_t group() const { return threadIdx.x / kWarp; }
  __device__ std::int64_t groups() const { return kWarps; }
  __device__ std::int64_t lane() const { return threadIdx.x % kWarp; }
  __device__ std::int64_t lanes() const { return kWarp; }

  __device__ void barrier() const { __syncthreads(); }

  __device__ double group_sum(double value) const {
    for (int step = kWarp / 2; step > 0; step /= 2)
      value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
  }

  __device__ double sum(double value) const {
    __shared__ double sums[kWarps];
    value = group_sum(value);
    if (lane() == 0) sums[group()] = value;
    __syncthreads();
    value = 0;
    for (int warp = 0; warp < kWarps; ++warp) value += sums[warp];
    __syncthreads();  // before the next reduction writes
    return value;
  }

  __device__ Choice largest(Choice mine) const {
    __shared__ double values[kWarps];
    __shared__ long long indices[kWarps];
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const Choice other{__shfl_xor_sync(kAllLanes, mine.value, step),
                         __shfl_xor_sync(kAllLanes, static_cast<long long>(mine.index), step)};
      if (other.beats(mine)) mine = other;
    }
    if (lane() == 0) {
      values[group()] = mine.value;
      indices[group()] = mine.index;
    }
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) {
      const Choice other{values[warp], indices[warp]};
      if (other.beats(mine)) mine = other;
    }
    __syncthreads();
    return mine;
  }

 private:
  static constexpr int kWarp = 32;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr unsigned kAllLanes = 0xffffffffu;
  static_assert(kThreads % kWarp == 0, "a block is whole warps");
};

}  // namespace tacext::cuda
