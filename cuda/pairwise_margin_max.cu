#include <algorithm>
#include <limits>
#include <type_traits>

#include "launch.cuh"

namespace tacext::cuda {
namespace {

constexpr int kSide = 16;   // a block is kSide x kSide threads
constexpr int kDepth = 16;  // samples held in shared memory at a time
constexpr std::int64_t kWantedBlocks = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kLeastSamples = 128;  // a block's share of the samples when they are split

// max, but a NaN on either side stays: fmaxf would drop it.
__device__ inline float max_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return b > a || b != b ? b : a;
#endif
}

__device__ inline double max_or_nan(double a, double b) { return b > a || b != b ? b : a; }

__device__ inline void atomic_max_or_nan(float* address, float value) {
  int seen = __float_as_int(*address);
  for (;;) {
    const float merged = max_or_nan(__int_as_float(seen), value);
    if (__float_as_int(merged) == seen) return;
    const int found = atomicCAS(reinterpret_cast<int*>(address), seen, __float_as_int(merged));
    if (found == seen) return;
    seen = found;
  }
}

__device__ inline void atomic_max_or_nan(double* address, double value) {
  using Bits = unsigned long long;
  Bits seen = static_cast<Bits>(__double_as_longlong(*address));
  for (;;) {
    const double merged = max_or_nan(__longlong_as_double(static_cast<long long>(seen)), value);
    const Bits wanted = static_cast<Bits>(__double_as_longlong(merged));
    if (wanted == seen) return;
    const Bits found = atomicCAS(reinterpret_cast<Bits*>(address), seen, wanted);
    if (found == seen) return;
    seen = found;
  }
}

// A block computes one tile of M, kSide * kEach classes square, over the samples of its split
// (blockIdx.z). Thread (x, y) holds kEach x kEach of its entries in registers, kSide apart:
//
//                    j: x          x + kSide    ...
//   k: y             best[0][0]    best[0][1]         best[r][c] = max over the staged samples i
//      y + kSide     best[1][0]    best[1][1]                      of  z[i, j] - z[i, k]
//      ...
//
// kDepth samples at a time are staged in shared memory: the tile's columns as z_j, its rows as z_k.
// Beyond the last sample z_j is -inf and z_k is +inf, so their difference never wins.
template <class T, class Margin, int kEach>
__global__ void __launch_bounds__(kSide* kSide)
    margin_max_kernel(const T* __restrict__ logits, std::int64_t samples, std::int64_t classes,
                      std::int64_t samples_a_split, Margin* margins) {
  constexpr int kTile = kSide * kEach;
  __shared__ Margin row_values[kDepth][kTile];
  __shared__ Margin column_values[kDepth][kTile];
  const int x = threadIdx.x, y = threadIdx.y;
  const std::int64_t k0 = static_cast<std::int64_t>(blockIdx.y) * kTile;
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const std::int64_t begin = blockIdx.z * samples_a_split;
  const std::int64_t end = begin + samples_a_split < samples ? begin + samples_a_split : samples;

  Margin best[kEach][kEach];
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int c = 0; c < kEach; ++c) best[r][c] = static_cast<Margin>(-kInfinity);

  for (std::int64_t i0 = begin; i0 < end; i0 += kDepth) {
    for (int e = y * kSide + x; e < kDepth * kTile; e += kSide * kSide) {
      const int depth = e / kTile, place = e % kTile;
      const std::int64_t i = i0 + depth, k = k0 + place, j = j0 + place;
      Margin z_k = static_cast<Margin>(kInfinity), z_j = static_cast<Margin>(-kInfinity);
      if (i < end) {
        z_k = k < classes ? static_cast<Margin>(to_float(logits[i * classes + k])) : Margin{0};
        z_j = j < classes ? static_cast<Margin>(to_float(logits[i * classes + j])) : Margin{0};
      }
      row_values[depth][place] = z_k;
      column_values[depth][place] = z_j;
    }
    __syncthreads();
#pragma unroll 4
    for (int depth = 0; depth < kDepth; ++depth) {
      Margin z_k[kEach], z_j[kEach];
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        z_k[r] = row_values[depth][y + r * kSide];
        z_j[r] = column_values[depth][x + r * kSide];
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r)
#pragma unroll
        for (int c = 0; c < kEach; ++c) best[r][c] = max_or_nan(best[r][c], z_j[c] - z_k[r]);
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      const std::int64_t k = k0 + y + r * kSide, j = j0 + x + c * kSide;
      if (k >= classes || j >= classes) continue;
      Margin* const entry = margins + k * classes + j;
      // -0 + 0 is +0: the sign of a zero does not depend on which split came first.
      const Margin value = best[r][c] + Margin{0};
      if (gridDim.z == 1)
        *entry = max_or_nan(*entry, value);
      else
        atomic_max_or_nan(entry, value);
    }
}

template <class T, class Margin, int kEach>
void launch_tiles(Launcher& launcher, const T* logits, std::int64_t samples, std::int64_t classes,
                  Margin* margins) {
  const std::int64_t tiles = ceil_div(classes, kSide * kEach);
  // Few tiles would leave most of the GPU idle: then several blocks share one, each with a part of
  // the samples, and merge with an atomic maximum, which no order can change.
  const std::int64_t wanted = std::clamp<std::int64_t>(
      std::min(kWantedBlocks / (tiles * tiles), samples / kLeastSamples), 1, kLargestGridYZ);
  const std::int64_t samples_a_split = ceil_div(ceil_div(samples, wanted), kDepth) * kDepth;
  const std::int64_t splits = ceil_div(samples, samples_a_split);
  launcher.run(margin_max_kernel<T, Margin, kEach>, grid(tiles, tiles, splits), dim3(kSide, kSide),
               logits, samples, classes, samples_a_split, margins);
}

template <class T>
void launch(Launcher& launcher, const T* logits, std::int64_t samples, std::int64_t classes,
            void* out) {
  using Margin = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr int kLargest = std::is_same_v<Margin, double> ? 4 : 8;
  Margin* const margins = static_cast<Margin*>(out);
  if (classes <= 16)
    launch_tiles<T, Margin, 1>(launcher, logits, samples, classes, margins);
  else if (classes <= 32)
    launch_tiles<T, Margin, 2>(launcher, logits, samples, classes, margins);
  else if (classes <= 512)
    launch_tiles<T, Margin, 4>(launcher, logits, samples, classes, margins);
  else
    launch_tiles<T, Margin, kLargest>(launcher, logits, samples, classes, margins);
}

}  // namespace
}  // namespace tacext::cuda

extern "C" int tacext_cuda_pairwise_margin_max(const void* logits, tacext_cuda_type type,
                                               std::int64_t samples, std::int64_t classes,
                                               void* margins, void* stream) {
  tacext::cuda::Launcher launcher(stream);
  if (samples > 0 && classes > 0)
    tacext::cuda::dispatch(type, [&](auto pointer) {
      tacext::cuda::launch(launcher, static_cast<decltype(pointer)>(logits), samples, classes,
                           margins);
    });
  return launcher.error();
}
