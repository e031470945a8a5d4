#include "tacext/neuron_scores.h"

#include <algorithm>

#include "simd.h"

namespace tacext {
namespace {

constexpr int kLanes = 8;

// Eight running sums, folded in a fixed tree: fast, and the same bits at every vector width.
template <class T>
TACEXT_INLINE double dot(const T* a, const T* b, std::int64_t count) {
  double sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane)
      sums[lane] += static_cast<double>(to_float(a[i + lane])) * to_float(b[i + lane]);
  for (int lane = 0; i < count; ++i, ++lane)
    sums[lane] += static_cast<double>(to_float(a[i])) * to_float(b[i]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// Positions are contiguous: a dot product for each sample of the channel.
template <class T>
TACEXT_INLINE void score_maps(const T* activation, const T* gradient, std::int64_t samples,
                              std::int64_t channels, std::int64_t positions, std::int64_t begin,
                              std::int64_t end, double* scores) {
  for (std::int64_t c = begin; c < end; ++c) scores[c] = 0;
  for (std::int64_t i = 0; i < samples; ++i)
    for (std::int64_t c = begin; c < end; ++c) {
      const std::int64_t at = (i * channels + c) * positions;
      scores[c] += dot(activation + at, gradient + at, positions);
    }
  for (std::int64_t c = begin; c < end; ++c) scores[c] /= static_cast<double>(samples);
}

// One position: channels are contiguous and the inner loop runs over them.
template <class T>
TACEXT_INLINE void score_neurons(const T* activation, const T* gradient, std::int64_t samples,
                                 std::int64_t channels, std::int64_t begin, std::int64_t end,
                                 double* scores) {
  for (std::int64_t c = begin; c < end; ++c) scores[c] = 0;
  for (std::int64_t i = 0; i < samples; ++i) {
    const T* a = activation + i * channels;
    const T* g = gradient + i * channels;
    for (std::int64_t c = begin; c < end; ++c)
      scores[c] += static_cast<double>(to_float(a[c])) * to_float(g[c]);
  }
  for (std::int64_t c = begin; c < end; ++c) scores[c] /= static_cast<double>(samples);
}

template <class T>
TACEXT_INLINE void score_range(const T* activation, const T* gradient, std::int64_t samples,
                               std::int64_t channels, std::int64_t positions, std::int64_t begin,
                               std::int64_t end, double* scores) {
  if (positions == 1)
    score_neurons(activation, gradient, samples, channels, begin, end, scores);
  else
    score_maps(activation, gradient, samples, channels, positions, begin, end, scores);
}

#define TACEXT_SCORE(T)                                                                            \
  TACEXT_SIMD_CLONES void score(const T* a, const T* g, std::int64_t n, std::int64_t channels,     \
                                std::int64_t p, std::int64_t begin, std::int64_t end, double* s) { \
    score_range(a, g, n, channels, p, begin, end, s);                                              \
  }
TACEXT_SCORE(float)
TACEXT_SCORE(double)
TACEXT_SCORE(Half)
TACEXT_SCORE(BFloat16)
#undef TACEXT_SCORE

}  // namespace

template <class T>
void neuron_scores(const T* activation, const T* gradient, std::int64_t samples,
                   std::int64_t channels, std::int64_t positions, double* scores,
                   const ParallelFor& parallel_for) {
  const std::int64_t work = std::max<std::int64_t>(1, samples * positions);
  parallel_for(channels, std::max<std::int64_t>(1, 65536 / work),
               [&](std::int64_t begin, std::int64_t end) {
                 score(activation, gradient, samples, channels, positions, begin, end, scores);
               });
}

template void neuron_scores(const float*, const float*, std::int64_t, std::int64_t, std::int64_t,
                            double*, const ParallelFor&);
template void neuron_scores(const double*, const double*, std::int64_t, std::int64_t, std::int64_t,
                            double*, const ParallelFor&);
template void neuron_scores(const Half*, const Half*, std::int64_t, std::int64_t, std::int64_t,
                            double*, const ParallelFor&);
template void neuron_scores(const BFloat16*, const BFloat16*, std::int64_t, std::int64_t,
                            std::int64_t, double*, const ParallelFor&);

}  // namespace tacext
