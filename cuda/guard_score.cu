#include <cmath>

#include "cuda_block.cuh"
#include "launch.cuh"

namespace tacext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kTile = 1024;  // latents at a time
// |y|^2, direction . y, and y along the basis.
constexpr std::int64_t kMostSums = 2 + TACEXT_CUDA_GUARD_MOST_RANKS;

__device__ bool is_finite(float value) { return value - value == 0; }

__device__ float root(double square) {
  return square > 0 ? static_cast<float>(sqrt(square)) : 0.0f;
}

// A block judges one row. Its threads stride over the logits, and then, tile by tile, over the
// latents for y = (phi - mean[k]) * inverse_spread, of which the warps share the sums; last thread
// 0 joins them:
//
//   logits   t0 t1 t2 ... t255 t0 t1 ..     the largest, k, the first of equals; then the next
//
//   y        t0 t1 t2 ... t255 t0 t1 ..     a tile, for all warps
//
//   |y|^2            warp 0   lanes 0 ... 31 0 ...    sums[0]
//   direction[k].y   warp 1                           sums[1]
//   basis[0].y       warp 2                           sums[2]
//   ...              ...
//   basis[6].y       warp 0                           sums[8]
template <class T>
__global__ void __launch_bounds__(kThreads)
    guard_kernel(const T* __restrict__ latent, const T* __restrict__ logits,
                 tacext_cuda_guard_table t, float* __restrict__ score, float* __restrict__ p_value,
                 bool* __restrict__ flagged) {
  __shared__ double sums[kMostSums];
  __shared__ float y[kTile];
  const CudaBlock<kThreads> block;
  const std::int64_t row = blockIdx.x;
  latent += row * t.latents;
  logits += row * t.classes;

  Choice first, next;
  double wrong = 0;  // logits that are not finite
  for (std::int64_t c = block.thread(); c < t.classes; c += kThreads) {
    const float z = static_cast<float>(to_float(logits[c]));
    const Choice here{z, c};
    if (!is_finite(z)) wrong += 1;
    if (here.beats(first)) first = here;  // never NaN
  }
  wrong = block.sum(wrong);
  first = block.largest(first);
  const std::int64_t k = first.index < 0 ? 0 : first.index;  // all may be NaN
  for (std::int64_t c = block.thread(); c < t.classes; c += kThreads) {
    const Choice here{static_cast<float>(to_float(logits[c])), c};
    if (c != k && here.beats(next)) next = here;
  }
  next = block.largest(next);

  const float* const mean = t.mean + k * t.latents;
  const std::int64_t count = 2 + t.ranks;
  for (std::int64_t begin = 0; begin < t.latents; begin += kTile) {
    const std::int64_t length = t.latents - begin < kTile ? t.latents - begin : kTile;
    for (std::int64_t i = block.thread(); i < length; i += kThreads) {
      const std::int64_t d = begin + i;
      y[i] = (static_cast<float>(to_float(latent[d])) - mean[d]) * t.inverse_spread[d];
    }
    block.barrier();
    for (std::int64_t s = block.group(); s < count; s += block.groups()) {
      const float* with = t.basis + (s - 2) * t.latents + begin;
      if (s == 0) with = y;
      if (s == 1) with = t.direction + k * t.latents + begin;
      double sum = 0;
      for (std::int64_t i = block.lane(); i < length; i += block.lanes())
        sum += static_cast<double>(y[i]) * static_cast<double>(with[i]);
      sum = block.group_sum(sum);
      if (block.lane() == 0) sums[s] = begin == 0 ? sum : sums[s] + sum;
    }
    block.barrier();  // before the next tile, and before the sums are read
  }
  if (block.thread() != 0) return;

  double near = t.near_weight[0] * sums[0], far = t.far_weight[0] * sums[0];
  for (std::int64_t r = 0; r < t.ranks; ++r) {
    near += t.near_weight[1 + r] * sums[2 + r] * sums[2 + r];
    far += t.far_weight[1 + r] * sums[2 + r] * sums[2 + r];
  }
  // In float from here on, as on the CPU: what overflows there does so here.
  const float parts[4] = {root(near), root(far), static_cast<float>(sums[1]),
                          static_cast<float>(first.value) - static_cast<float>(next.value)};
  float total = 0;
  for (int i = 0; i < 4; ++i) {
    const float excess = (parts[i] - t.location[k * 4 + i]) * t.inverse_deviation[k * 4 + i];
    if (excess > 0) total += excess * excess;
  }
  // Of a latent that is not finite |y|^2 is not.
  float found = sqrtf(total);
  if (wrong > 0 || !is_finite(static_cast<float>(sums[0])) || !is_finite(found)) found = INFINITY;
  std::int64_t below = 0, end = t.knot_count;  // knots[below - 1] < found <= knots[end]
  while (below < end) {
    const std::int64_t middle = (below + end) / 2;
    if (t.knots[middle] < found)
      below = middle + 1;
    else
      end = middle;
  }
  score[row] = found;
  p_value[row] = (1 + t.exceeding[below]) / static_cast<float>(1 + *t.samples);
  flagged[row] = found > *t.threshold;
}

}  // namespace
}  // namespace tacext::cuda

extern "C" int tacext_cuda_guard_score(const tacext_cuda_guard_table* table, const void* latent,
                                       const void* logits, tacext_cuda_type type, int64_t count,
                                       float* score, float* p_value, bool* flagged, void* stream) {
  tacext::cuda::Launcher launcher(stream);
  if (count <= 0) return launcher.error();
  if (table->ranks > TACEXT_CUDA_GUARD_MOST_RANKS) return cudaErrorInvalidValue;
  tacext::cuda::dispatch(type, [&](auto pointer) {
    using Element = decltype(pointer);
    launcher.run(tacext::cuda::guard_kernel<std::remove_const_t<std::remove_pointer_t<Element>>>,
                 tacext::cuda::grid(count), dim3(tacext::cuda::kThreads),
                 static_cast<Element>(latent), static_cast<Element>(logits), *table, score, p_value,
                 flagged);
  });
  return launcher.error();
}
