#include <algorithm>
#include <limits>
#include <type_traits>

#include "launch.cuh"

namespace tacext::cuda {
namespace {

constexpr int kDepth = 16;                 // samples held in shared memory at a time
constexpr int kThreadsPerProcessor = 512;  // at least: 128 registers a thread
constexpr std::int64_t kWantedBlocks = 4096;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kLeastSamples = 128;  // a block's share of the samples when they are split

// max and min, but a NaN on either side stays: fmaxf and fminf would drop it.
__device__ inline float max_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return b > a || b != b ? b : a;
#endif
}

__device__ inline float min_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return b < a || b != b ? b : a;
#endif
}

__device__ inline double max_or_nan(double a, double b) { return b > a || b != b ? b : a; }
__device__ inline double min_or_nan(double a, double b) { return b < a || b != b ? b : a; }

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

template <class Margin>
__device__ void merge(Margin* entry, Margin value) {
  value += Margin{0};  // -0 + 0 is +0: the sign of a zero does not depend on which split came first
  if (gridDim.z == 1)
    *entry = max_or_nan(*entry, value);
  else
    atomic_max_or_nan(entry, value);
}

// The shape of a block's tile of M: kAcross x kDown threads, each with kRows x kColumns entries.
template <class Margin, int kAcross_, int kDown_, int kRows_, int kColumns_>
struct Tile {
  static constexpr int kAcross = kAcross_, kDown = kDown_, kRows = kRows_, kColumns = kColumns_;
  static constexpr int kThreads = kAcross * kDown;
  static constexpr int kSide = kAcross * kColumns;
  static constexpr int kStaged = 2 * kSide;  // z_k of the rows, then z_j of the columns
  static_assert(kSide == kDown * kRows, "a tile and its mirror image have the same shape");
  static_assert(kThreads % kStaged == 0 && kDepth * kStaged % kThreads == 0);

  /// Where a thread's n-th row or column lies: neighbours fill 16 bytes, one load.
  template <int kEach>
  __device__ static constexpr int place(int thread, int threads, int n) {
    constexpr int kFill = 16 / static_cast<int>(sizeof(Margin));
    constexpr int kVector = kEach < kFill ? kEach : kFill;
    return (n / kVector * threads + thread) * kVector + n % kVector;
  }
  __device__ static constexpr int row(int r) { return place<kRows>(threadIdx.y, kDown, r); }
  __device__ static constexpr int column(int c) { return place<kColumns>(threadIdx.x, kAcross, c); }
};

// Folds the samples begin to end into one tile of M, and with kMirror into its mirror image too:
// one difference serves M[k, j] and, negated, M[j, k]. Thread (x, y) holds in registers, of a 64 x
// 64 tile of floats,
//
//                 j: 4x .. 4x + 3, 32 + 4x .. 32 + 4x + 3
//   k: 4y         high[0][0] ..    high[0][4] ..           high[r][c] = max over the staged samples
//      4y + 1     high[1][0] ..                            i of  z[i, j] - z[i, k];  low: the min,
//      4y + 2     ..                                       so M[k, j] = high, M[j, k] = -low
//      4y + 3
//
// kDepth samples at a time are staged in shared memory. Past the last sample and the last class the
// last one is read again: a sample met twice changes no maximum, and a class has one owner.
template <class Tile, bool kMirror, class T, class Margin>
__device__ void fold(const T* __restrict__ logits, std::int64_t begin, std::int64_t end,
                     std::int64_t classes, std::int64_t k0, std::int64_t j0,
                     Margin (&staged)[kDepth][Tile::kStaged], Margin* margins) {
  Margin high[Tile::kRows][Tile::kColumns], low[Tile::kRows][Tile::kColumns];
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r)
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      high[r][c] = static_cast<Margin>(-kInfinity);
      low[r][c] = static_cast<Margin>(kInfinity);
    }

  const int thread = threadIdx.y * Tile::kAcross + threadIdx.x;
  const int place = thread % Tile::kStaged;  // a thread stages one class, of every kStep-th sample
  constexpr int kStep = Tile::kThreads / Tile::kStaged;
  const std::int64_t wanted = place < Tile::kSide ? k0 + place : j0 + (place - Tile::kSide);
  const T* source = logits + begin * classes + (wanted < classes ? wanted : classes - 1);
  const int width = static_cast<int>(classes);  // the grid ends long before an int does
  for (std::int64_t left = end - begin; left > 0; left -= kDepth, source += kDepth * classes) {
    const int last = left < kDepth ? static_cast<int>(left) - 1 : kDepth - 1;
#pragma unroll
    for (int n = 0; n < kDepth / kStep; ++n) {
      const int depth = n * kStep + thread / Tile::kStaged;
      staged[depth][place] =
          static_cast<Margin>(to_float(source[(depth < last ? depth : last) * width]));
    }
    __syncthreads();
#pragma unroll 4
    for (int depth = 0; depth < kDepth; ++depth) {
      Margin z_k[Tile::kRows], z_j[Tile::kColumns];
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) z_k[r] = staged[depth][Tile::row(r)];
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c)
        z_j[c] = staged[depth][Tile::kSide + Tile::column(c)];
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r)
#pragma unroll
        for (int c = 0; c < Tile::kColumns; ++c) {
          const Margin difference = z_j[c] - z_k[r];
          high[r][c] = max_or_nan(high[r][c], difference);
          if (kMirror) low[r][c] = min_or_nan(low[r][c], difference);
        }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r)
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const std::int64_t k = k0 + Tile::row(r), j = j0 + Tile::column(c);
      if (k >= classes || j >= classes) continue;
      merge(margins + k * classes + j, high[r][c]);
      if (kMirror) merge(margins + j * classes + k, -low[r][c]);
    }
}

// A block takes the tile of rows blockIdx.y and columns blockIdx.x and its mirror image, over the
// samples of its split (blockIdx.z). Tiles below the diagonal are mirror images: nothing to do.
template <class Tile, class T, class Margin>
__global__ void __launch_bounds__(Tile::kThreads, kThreadsPerProcessor / Tile::kThreads)
    margin_max_kernel(const T* __restrict__ logits, std::int64_t samples, std::int64_t classes,
                      std::int64_t samples_a_split, Margin* margins) {
  if (blockIdx.x < blockIdx.y) return;
  alignas(16) __shared__ Margin staged[kDepth][Tile::kStaged];
  const std::int64_t k0 = static_cast<std::int64_t>(blockIdx.y) * Tile::kSide;
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.x) * Tile::kSide;
  const std::int64_t begin = blockIdx.z * samples_a_split;
  const std::int64_t end = begin + samples_a_split < samples ? begin + samples_a_split : samples;
  if (blockIdx.x == blockIdx.y)
    fold<Tile, false>(logits, begin, end, classes, k0, j0, staged, margins);
  else
    fold<Tile, true>(logits, begin, end, classes, k0, j0, staged, margins);
}

template <class Tile, class T, class Margin>
void launch_tiles(Launcher& launcher, const T* logits, std::int64_t samples, std::int64_t classes,
                  Margin* margins) {
  const std::int64_t tiles = ceil_div(classes, Tile::kSide), busy = tiles * (tiles + 1) / 2;
  // Few tiles would leave most of the GPU idle: then several blocks share one, each with a part of
  // the samples, and merge with an atomic maximum, which no order can change.
  const std::int64_t wanted = std::clamp<std::int64_t>(
      std::min(kWantedBlocks / busy, samples / kLeastSamples), 1, kLargestGridYZ);
  const std::int64_t samples_a_split = ceil_div(ceil_div(samples, wanted), kDepth) * kDepth;
  const std::int64_t splits = ceil_div(samples, samples_a_split);
  launcher.run(margin_max_kernel<Tile, T, Margin>, grid(tiles, tiles, splits),
               dim3(Tile::kAcross, Tile::kDown), logits, samples, classes, samples_a_split,
               margins);
}

template <class T>
void launch(Launcher& launcher, const T* logits, std::int64_t samples, std::int64_t classes,
            void* out) {
  using Margin = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using Large = std::conditional_t<std::is_same_v<T, double>, Tile<double, 8, 16, 2, 4>,
                                   Tile<float, 8, 16, 4, 8>>;
  Margin* const margins = static_cast<Margin*>(out);
  if (classes <= 16)
    launch_tiles<Tile<Margin, 16, 16, 1, 1>>(launcher, logits, samples, classes, margins);
  else if (classes <= 32)
    launch_tiles<Tile<Margin, 16, 16, 2, 2>>(launcher, logits, samples, classes, margins);
  else
    launch_tiles<Large>(launcher, logits, samples, classes, margins);
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
