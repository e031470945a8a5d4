#include "tacext/pairwise_margin_quantile.h"

#include <algorithm>

#include "margin_panel.h"
#include "margin_selection.h"

namespace tacext {
namespace {

constexpr std::int64_t kSharedFrom = 1'000'000;  // differences; fewer end before a thread wakes

/// body(kept, k, j, z_j, z_k) for every pair, tile by tile so that the rows stay in the cache.
template <class T, class Margin, class Body>
void for_pairs(const T* logits, std::int64_t samples, std::int64_t classes, std::int64_t keep,
               const ParallelFor& threads, const Body& body) {
  if (samples == 0 || classes == 0) return;
  const bool shared = samples * classes * classes >= kSharedFrom;
  const ParallelFor& parallel_for = shared ? threads : ParallelFor(serial_for);
  Panel<Margin> panel;
  fill_panel(logits, samples, classes, panel, parallel_for);
  const std::int64_t side = std::clamp<std::int64_t>(classes / 8, 4, 32);
  const std::int64_t tiles = (classes + side - 1) / side;
  const std::int64_t grain = std::max<std::int64_t>(1, 65536 / (side * side * samples));
  parallel_for(tiles * tiles, grain, [&](std::int64_t begin, std::int64_t end) {
    LargestKept<Margin> kept(keep);
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t k0 = t / tiles * side, j0 = t % tiles * side;
      for (std::int64_t k = k0; k < std::min(k0 + side, classes); ++k)
        for (std::int64_t j = j0; j < std::min(j0 + side, classes); ++j)
          body(kept, k, j, panel.values.data() + j * panel.stride,
               panel.values.data() + k * panel.stride);
    }
  });
}

}  // namespace

template <class T, class Margin>
void pairwise_margin_quantile(const T* logits, std::int64_t samples, std::int64_t classes,
                              std::int64_t keep, Margin* margins, const ParallelFor& parallel_for) {
  for_pairs<T, Margin>(logits, samples, classes, keep, parallel_for,
                       [&](LargestKept<Margin>& kept, std::int64_t k, std::int64_t j,
                           const Margin* zj, const Margin* zk) {
                         kept.start();
                         kept.add_differences(zj, zk, samples);
                         margins[k * classes + j] = kept.smallest_kept();
                       });
}

template <class T, class Margin>
void pairwise_margin_largest(const T* logits, std::int64_t samples, std::int64_t classes,
                             std::int64_t keep, Margin* largest, const ParallelFor& parallel_for) {
  for_pairs<T, Margin>(logits, samples, classes, keep, parallel_for,
                       [&](LargestKept<Margin>& kept, std::int64_t k, std::int64_t j,
                           const Margin* zj, const Margin* zk) {
                         Margin* const pair = largest + (k * classes + j) * keep;
                         kept.start(pair, keep);
                         kept.add_differences(zj, zk, samples);
                         kept.write(pair);
                       });
}

#define TACEXT_QUANTILES(T, Margin)                                                          \
  template void pairwise_margin_quantile(const T*, std::int64_t, std::int64_t, std::int64_t, \
                                         Margin*, const ParallelFor&);                       \
  template void pairwise_margin_largest(const T*, std::int64_t, std::int64_t, std::int64_t,  \
                                        Margin*, const ParallelFor&);
TACEXT_QUANTILES(float, float)
TACEXT_QUANTILES(Half, float)
TACEXT_QUANTILES(BFloat16, float)
TACEXT_QUANTILES(double, double)
#undef TACEXT_QUANTILES

}  // namespace tacext
