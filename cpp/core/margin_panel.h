#pragma once

#include <cstdint>
#include <vector>

#include "margin_tiles.h"
#include "tacext/half.h"
#include "tacext/parallel.h"

namespace tacext {

/// An order of the samples in which the first decide most entries of M, so that few later ones get
/// past the screen: the widest logits first. The order changes no result, only the time.
template <class Margin>
struct SampleOrder {
  std::vector<std::int64_t> sample;  // sample[place]
  std::vector<Margin> half_range;    // of the sample's logits less the offsets, by place
  std::vector<Margin> shift;         // the middle of that range, by place
  std::vector<Margin> offset;        // [classes], about the middle of each class
  /// [classes, kTop] samples with the largest logits of each class, beside their own middle.
  std::vector<std::int64_t> top;
  /// Places from here on are narrow enough for coarse copies that are worth having and accurate
  /// enough to be safe; all of them may be before it.
  std::int64_t screened = 0;
};

constexpr std::int64_t kTop = 4;

template <class T, class Margin>
SampleOrder<Margin> order_samples(const T* logits, std::int64_t samples, std::int64_t classes,
                                  const ParallelFor& parallel_for);

/// Raises the entries of the tile by what the top samples of its classes show.
template <class T, class Margin>
void margins_of_top(const T* logits, const SampleOrder<Margin>& order,
                    const MarginTile<Margin>& tile);

/// Fills the panel with places [begin, end) of the order, each with a coarse copy if `coarse`.
template <class T, class Margin>
void fill_panel(const T* logits, std::int64_t classes, const SampleOrder<Margin>& order,
                std::int64_t begin, std::int64_t end, bool coarse, Panel<Margin>& panel,
                const ParallelFor& parallel_for);

/// Fills the panel with `samples` samples as they come, without coarse copies.
template <class T, class Margin>
void fill_panel(const T* logits, std::int64_t samples, std::int64_t classes, Panel<Margin>& panel,
                const ParallelFor& parallel_for);

}  // namespace tacext
