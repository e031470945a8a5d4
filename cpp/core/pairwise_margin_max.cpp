#include "tacext/pairwise_margin_max.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include "balanced_for.h"
#include "margin_panel.h"
#include "margin_tiles.h"

namespace tacext {
namespace {

constexpr std::int64_t kCachedBytes = 768 << 10;  // about a core's own cache
constexpr std::int64_t kSharedBytes = 12 << 20;   // stays in the cache that the cores share
constexpr std::int64_t kMostBytes = 40 << 20;
constexpr std::int64_t kTilesFromClasses = 128;   // fewer leave too few tiles to share
constexpr std::int64_t kScreenFromClasses = 256;  // fewer are done before a coarse copy is
/// Fewer samples are done before the screen has been seeded, which costs the more the larger M is.
std::int64_t screen_from_samples(std::int64_t classes) { return 1024 + classes / 2; }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Samples of each panel: what `bytes` hold, though 1024 where kMostBytes allow, cut evenly.
std::int64_t panel_samples(std::int64_t samples, std::int64_t bytes, std::int64_t bytes_a_sample) {
  const std::int64_t least = std::clamp<std::int64_t>(kMostBytes / bytes_a_sample, 256, 1024);
  const std::int64_t panels = ceil_div(samples, std::max(bytes / bytes_a_sample, least));
  return ceil_div(ceil_div(samples, panels), kSampleGroup) * kSampleGroup;
}

/// Tiles with j0 <= k0, which with their mirror images cover M.
template <class Margin, class Body>
void for_tiles(const Panel<Margin>& panel, Margin* margins, const ParallelFor& parallel_for,
               const Body& body) {
  const std::int64_t side = ceil_div(panel.classes, kTileClasses);
  balanced_for(side * (side + 1) / 2, parallel_for, [&](std::int64_t tile) {
    std::int64_t j = 0;
    for (; tile >= side - j; ++j) tile -= side - j;
    body(MarginTile<Margin>{panel, j * kTileClasses, (j + tile) * kTileClasses, margins});
  });
}

/// Few classes, and few tiles. Threads share the samples, each with a small M of its own.
template <class T, class Margin>
void by_samples(const T* logits, std::int64_t samples, std::int64_t classes, Margin* margins,
                const ParallelFor& parallel_for) {
  const std::int64_t rows = ceil_div(classes, kTileClasses) * kTileClasses;
  const std::int64_t step =
      panel_samples(samples, kCachedBytes, rows * static_cast<std::int64_t>(sizeof(Margin)));
  const std::int64_t grain = ceil_div(1 << 20, step * (classes * classes + 16 * classes));
  std::mutex mutex;
  parallel_for(ceil_div(samples, step), grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<Margin> own(static_cast<std::size_t>(classes * classes),
                            -std::numeric_limits<Margin>::infinity());
    Panel<Margin> panel;
    for (std::int64_t p = begin; p < end; ++p) {
      fill_panel(logits + p * step * classes, std::min(step, samples - p * step), classes, panel,
                 serial_for);
      for_tiles(panel, own.data(), serial_for,
                [](const MarginTile<Margin>& tile) { margins_direct(tile); });
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (std::size_t i = 0; i < own.size(); ++i)
      if (own[i] > margins[i]) margins[i] = own[i];
  });
}

/// Many classes: threads share the tiles of M, panel after panel.
template <class T, class Margin>
void by_tiles(const T* logits, std::int64_t samples, std::int64_t classes, Margin* margins,
              const ParallelFor& parallel_for) {
  const std::int64_t rows = ceil_div(classes, kTileClasses) * kTileClasses;
  Panel<Margin> panel;
  const auto direct = [](const MarginTile<Margin>& tile) { margins_direct(tile); };
  if (classes < kScreenFromClasses || samples < screen_from_samples(classes)) {
    const std::int64_t step =
        panel_samples(samples, kSharedBytes, rows * static_cast<std::int64_t>(sizeof(Margin)));
    for (std::int64_t i = 0; i < samples; i += step) {
      fill_panel(logits + i * classes, std::min(step, samples - i), classes, panel, parallel_for);
      for_tiles(panel, margins, parallel_for, direct);
    }
    return;
  }
  const SampleOrder<Margin> order =
      order_samples<T, Margin>(logits, samples, classes, parallel_for);
  const auto by_panels = [&](std::int64_t begin, std::int64_t end, bool coarse, const auto& body) {
    if (begin == end) return;
    const std::int64_t step = panel_samples(end - begin, kSharedBytes,
                                            rows * static_cast<std::int64_t>(sizeof(Margin) + 1));
    for (std::int64_t i = begin; i < end; i += step) {
      fill_panel(logits, classes, order, i, std::min(i + step, end), coarse, panel, parallel_for);
      for_tiles(panel, margins, parallel_for, body);
    }
  };
  if (order.screened < samples) {
    panel.classes = classes;
    for_tiles(panel, margins, parallel_for,
              [&](const MarginTile<Margin>& tile) { margins_of_top(logits, order, tile); });
  }
  by_panels(0, order.screened, false, direct);
  by_panels(order.screened, samples, true,
            [&](const MarginTile<Margin>& tile) { margins_screened(tile); });
}

}  // namespace

template <class T, class Margin>
void pairwise_margin_max(const T* logits, std::int64_t samples, std::int64_t classes,
                         Margin* margins, const ParallelFor& parallel_for) {
  if (samples == 0 || classes == 0) return;
  if (classes < kTilesFromClasses)
    by_samples(logits, samples, classes, margins, parallel_for);
  else
    by_tiles(logits, samples, classes, margins, parallel_for);
}

template void pairwise_margin_max(const float*, std::int64_t, std::int64_t, float*,
                                  const ParallelFor&);
template void pairwise_margin_max(const Half*, std::int64_t, std::int64_t, float*,
                                  const ParallelFor&);
template void pairwise_margin_max(const BFloat16*, std::int64_t, std::int64_t, float*,
                                  const ParallelFor&);
template void pairwise_margin_max(const double*, std::int64_t, std::int64_t, double*,
                                  const ParallelFor&);

}  // namespace tacext
