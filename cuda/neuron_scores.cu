#include <algorithm>

#include "launch.cuh"

namespace tacext::cuda {
namespace {

constexpr int kColumns = 32;  // columns_kernel: a block is kColumns x kRows threads
constexpr int kRows = 8;
constexpr int kMapThreads = 256;
constexpr std::int64_t kSmallMap = 32;  // up to so many positions a map does not fill a warp
constexpr std::int64_t kWantedBlocks = 2048;

/// How the samples are cut, by the sizes alone: the same bits on every GPU.
struct Plan {
  std::int64_t columns;  // partial sums a part: one a channel, or one a channel and position
  std::int64_t blocks;   // blocks that one part of the samples takes
  std::int64_t samples_a_part, parts;
  bool by_columns;

  Plan(std::int64_t samples, std::int64_t channels, std::int64_t positions)
      : by_columns(positions <= kSmallMap) {
    columns = by_columns ? channels * positions : channels;
    blocks = by_columns ? ceil_div(columns, kColumns) : channels;
    const std::int64_t least = by_columns ? 4 * kRows : ceil_div(4 * kMapThreads, positions);
    const std::int64_t wanted = std::clamp<std::int64_t>(
        std::min(kWantedBlocks / std::max<std::int64_t>(1, blocks), samples / least), 1,
        kLargestGridYZ);
    samples_a_part = ceil_div(samples, wanted);
    parts = ceil_div(samples, samples_a_part);
  }
};

template <class T>
__device__ double product(const T* a, const T* g, std::int64_t at) {
  return static_cast<double>(to_float(a[at])) * static_cast<double>(to_float(g[at]));
}

// Maps of few positions: the values of a sample are columns, and neighbouring threads take
// neighbouring columns. Thread (x, y) sums column x over every kRows-th sample of the part:
//
//            column 0   1   2  ...  31
//   sample 0      y=0                      then the kRows sums of a column are added, y = 0 first:
//   sample 1      y=1                      partial[part, column]
//   ...           ...
//   sample 8      y=0
template <class T>
__global__ void __launch_bounds__(kColumns* kRows)
    columns_kernel(const T* __restrict__ activation, const T* __restrict__ gradient,
                   std::int64_t samples, std::int64_t columns, std::int64_t samples_a_part,
                   double* __restrict__ partial) {
  __shared__ double sums[kRows][kColumns];
  const int x = threadIdx.x, y = threadIdx.y;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kColumns + x;
  const std::int64_t begin = blockIdx.y * samples_a_part;
  const std::int64_t end = begin + samples_a_part < samples ? begin + samples_a_part : samples;
  double sum = 0;
  if (column < columns)
    for (std::int64_t i = begin + y; i < end; i += kRows)
      sum += product(activation, gradient, i * columns + column);
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || column >= columns) return;
  for (int row = 1; row < kRows; ++row) sum += sums[row][x];
  partial[blockIdx.y * columns + column] = sum;
}

// Larger maps: a block sums one channel over its part of the samples. Its threads walk the maps of
// the part as if they lay end to end, neighbouring threads on neighbouring positions:
//
//   sample 0, channel c   t0 t1 t2 .... t255 t0 t1 ..
//   sample 1, channel c   .. continues where sample 0 ended
//
// then the threads' sums are folded in halves: partial[part, c].
template <class T>
__global__ void __launch_bounds__(kMapThreads)
    maps_kernel(const T* __restrict__ activation, const T* __restrict__ gradient,
                std::int64_t samples, std::int64_t channels, std::int64_t positions,
                std::int64_t samples_a_part, double* __restrict__ partial) {
  __shared__ double sums[kMapThreads];
  const int thread = threadIdx.x;
  const std::int64_t channel = blockIdx.x;
  const std::int64_t begin = blockIdx.y * samples_a_part;
  const std::int64_t end = begin + samples_a_part < samples ? begin + samples_a_part : samples;
  const std::int64_t sample_step = kMapThreads / positions, rest = kMapThreads % positions;
  std::int64_t i = begin + thread / positions, p = thread % positions;
  double sum = 0;
  while (i < end) {
    sum += product(activation, gradient, (i * channels + channel) * positions + p);
    i += sample_step;
    p += rest;
    if (p >= positions) {
      p -= positions;
      ++i;
    }
  }
  sums[thread] = sum;
  for (int half = kMapThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread == 0) partial[blockIdx.y * channels + channel] = sums[0];
}

// Thread c: scores[c] = sum of the channel's partial sums, part by part, over samples.
__global__ void total_kernel(const double* __restrict__ partial, std::int64_t parts,
                             std::int64_t channels, std::int64_t width, std::int64_t samples,
                             double* __restrict__ scores) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  double sum = 0;
  for (std::int64_t part = 0; part < parts; ++part)
    for (std::int64_t w = 0; w < width; ++w) sum += partial[(part * channels + c) * width + w];
  scores[c] = sum / static_cast<double>(samples);
}

template <class T>
void launch(Launcher& launcher, const T* activation, const T* gradient, std::int64_t samples,
            std::int64_t channels, std::int64_t positions, double* scores, double* workspace) {
  const Plan plan(samples, channels, positions);
  if (plan.by_columns)
    launcher.run(columns_kernel<T>, grid(plan.blocks, plan.parts), dim3(kColumns, kRows),
                 activation, gradient, samples, plan.columns, plan.samples_a_part, workspace);
  else
    launcher.run(maps_kernel<T>, grid(plan.blocks, plan.parts), dim3(kMapThreads), activation,
                 gradient, samples, channels, positions, plan.samples_a_part, workspace);
  launcher.run(total_kernel, grid(ceil_div(channels, 64)), dim3(64), workspace, plan.parts,
               channels, plan.columns / channels, samples, scores);
}

}  // namespace
}  // namespace tacext::cuda

extern "C" std::int64_t tacext_cuda_neuron_scores_workspace(std::int64_t samples,
                                                            std::int64_t channels,
                                                            std::int64_t positions) {
  if (samples <= 0 || channels <= 0 || positions <= 0) return 0;
  const tacext::cuda::Plan plan(samples, channels, positions);
  return plan.parts * plan.columns;
}

extern "C" int tacext_cuda_neuron_scores(const void* activation, const void* gradient,
                                         tacext_cuda_type type, std::int64_t samples,
                                         std::int64_t channels, std::int64_t positions,
                                         double* scores, double* workspace, void* stream) {
  tacext::cuda::Launcher launcher(stream);
  if (samples <= 0 || channels <= 0) return launcher.error();
  if (positions <= 0) {
    launcher.fill_bytes(scores, 0, channels * static_cast<std::int64_t>(sizeof(double)));
    return launcher.error();
  }
  tacext::cuda::dispatch(type, [&](auto pointer) {
    tacext::cuda::launch(launcher, static_cast<decltype(pointer)>(activation),
                         static_cast<decltype(pointer)>(gradient), samples, channels, positions,
                         scores, workspace);
  });
  return launcher.error();
}
