#include "margin_panel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace tacext {
namespace {

constexpr std::int64_t kOffsetSamples = 64;  // rows that the classes' offsets are taken from
constexpr std::int64_t kLeadingShare = 50;   // the widest sample in so many goes unscreened
// A level, a 63rd of the range, must be far above the rounding of the largest logits: coarse
// differences and bounds carry 6 roundings of at most epsilon times the largest logit, together
// less than the twentieth of a level that margin_tiles.cpp allows.
template <class Margin>
constexpr Margin kLeastRange = 10000 * std::numeric_limits<Margin>::epsilon();

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- rows of logits, in the type of the margins -------------------------------------------------

template <class T, class Margin>
TACEXT_INLINE void convert_row(const T* from, std::int64_t count, Margin* to) {
  for (std::int64_t j = 0; j < count; ++j) to[j] = to_float(from[j]);
}
TACEXT_SIMD_CLONES void load_row(const float* f, std::int64_t n, float* t) { convert_row(f, n, t); }
TACEXT_SIMD_CLONES void load_row(const Half* f, std::int64_t n, float* t) { convert_row(f, n, t); }
TACEXT_SIMD_CLONES void load_row(const BFloat16* f, std::int64_t n, float* t) {
  convert_row(f, n, t);
}
TACEXT_SIMD_CLONES void load_row(const double* f, std::int64_t n, double* t) {
  convert_row(f, n, t);
}

// ---- one sample's place and spread --------------------------------------------------------------

template <class Margin>
struct Spread {
  Margin low, high;  // of the logits less the offsets
  Margin size;       // largest |logit|
};

template <class Margin>
TACEXT_INLINE Spread<Margin> spread_of(const Margin* row, const Margin* offset,
                                       std::int64_t count) {
  Margin low = row[0] - offset[0], high = low, size = 0;
#pragma omp simd reduction(min : low) reduction(max : high, size)
  for (std::int64_t j = 0; j < count; ++j) {
    const Margin centred = row[j] - offset[j];
    low = centred < low ? centred : low;
    high = centred > high ? centred : high;
    const Margin absolute = row[j] < 0 ? -row[j] : row[j];
    size = absolute > size ? absolute : size;
  }
  return {low, high, size};
}
TACEXT_SIMD_CLONES Spread<float> spread(const float* r, const float* o, std::int64_t n) {
  return spread_of(r, o, n);
}
TACEXT_SIMD_CLONES Spread<double> spread(const double* r, const double* o, std::int64_t n) {
  return spread_of(r, o, n);
}

template <class Margin>
Margin middle(Margin low, Margin high) {
  return low / 2 + high / 2;
}

// ---- the samples in which a class is largest ----------------------------------------------------

/// The kTop largest values of every class seen so far, and the samples they come from.
template <class Margin>
struct TopSamples {
  explicit TopSamples(std::int64_t count)
      : classes(count),
        least(static_cast<std::size_t>(count), -std::numeric_limits<Margin>::infinity()),
        value(static_cast<std::size_t>(count * kTop), -std::numeric_limits<Margin>::infinity()),
        sample(static_cast<std::size_t>(count * kTop), 0) {}

  void add(std::int64_t j, Margin v, std::int64_t i) {
    Margin* const values = value.data() + j * kTop;
    const std::int64_t place = std::min_element(values, values + kTop) - values;
    if (!(v > values[place])) return;
    values[place] = v;
    sample[j * kTop + place] = i;
    least[j] = *std::min_element(values, values + kTop);
  }

  void merge(const TopSamples& other) {
    for (std::int64_t e = 0; e < classes * kTop; ++e)
      add(e / kTop, other.value[e], other.sample[e]);
  }

  std::int64_t classes;
  std::vector<Margin> least;  // the smallest of a class's values: what a new one must beat
  std::vector<Margin> value;
  std::vector<std::int64_t> sample;
};

// Which of up to 64 classes beat their least: row[j] - shift > least[j].
template <class Margin>
TACEXT_INLINE std::uint64_t beating(const Margin* row, Margin shift, const Margin* least,
                                    std::int64_t count) {
  bool any = false;
  for (std::int64_t j = 0; j < count; ++j) any |= row[j] - shift > least[j];
  std::uint64_t bits = 0;
  if (any)
    for (std::int64_t j = 0; j < count; ++j)
      bits |= static_cast<std::uint64_t>(row[j] - shift > least[j]) << j;
  return bits;
}
TACEXT_SIMD_CLONES std::uint64_t beats(const float* r, float s, const float* l, std::int64_t n) {
  return beating(r, s, l, n);
}
TACEXT_SIMD_CLONES std::uint64_t beats(const double* r, double s, const double* l, std::int64_t n) {
  return beating(r, s, l, n);
}

// ---- kSampleGroup samples, class by class -------------------------------------------------------

constexpr std::int64_t kPiece = 16;  // classes at a time: a cache line of each sample's floats

TACEXT_INLINE void transpose(const float* piece, std::int64_t classes, float* values,
                             std::int64_t stride) {
  typedef float Four __attribute__((vector_size(16)));
  typedef std::int32_t Index __attribute__((vector_size(16)));
  for (std::int64_t j = 0; j < classes; j += 4)
    for (std::int64_t i = 0; i < kSampleGroup; i += 4) {
      Four r[4];  // four samples of four classes
      for (int x = 0; x < 4; ++x) __builtin_memcpy(&r[x], piece + (i + x) * kPiece + j, 16);
      const Four a = __builtin_shuffle(r[0], r[1], Index{0, 4, 1, 5});
      const Four b = __builtin_shuffle(r[2], r[3], Index{0, 4, 1, 5});
      const Four c = __builtin_shuffle(r[0], r[1], Index{2, 6, 3, 7});
      const Four d = __builtin_shuffle(r[2], r[3], Index{2, 6, 3, 7});
      r[0] = __builtin_shuffle(a, b, Index{0, 1, 4, 5});
      r[1] = __builtin_shuffle(a, b, Index{2, 3, 6, 7});
      r[2] = __builtin_shuffle(c, d, Index{0, 1, 4, 5});
      r[3] = __builtin_shuffle(c, d, Index{2, 3, 6, 7});
      for (int x = 0; x < 4 && j + x < classes; ++x)
        __builtin_memcpy(values + (j + x) * stride + i, &r[x], 16);
    }
}

TACEXT_INLINE void transpose(const double* piece, std::int64_t classes, double* values,
                             std::int64_t stride) {
  for (std::int64_t j = 0; j < classes; ++j)
    for (std::int64_t i = 0; i < kSampleGroup; ++i) values[j * stride + i] = piece[i * kPiece + j];
}

template <class T, class Margin>
TACEXT_INLINE void fill_group(const T* const* rows, std::int64_t classes, Margin* values,
                              std::int64_t stride) {
  Margin piece[kSampleGroup * kPiece];
  for (std::int64_t j = 0; j < classes; j += kPiece) {
    const std::int64_t count = std::min(kPiece, classes - j);
    if (count == kPiece) {  // lengths known to the compiler
      for (std::int64_t i = 0; i < kSampleGroup; ++i) {
        __builtin_prefetch(rows[i] + std::min(j + 2 * kPiece, classes - 1));
        convert_row(rows[i] + j, kPiece, piece + i * kPiece);
      }
      transpose(piece, kPiece, values + j * stride, stride);
    } else {
      for (std::int64_t i = 0; i < kSampleGroup; ++i)
        convert_row(rows[i] + j, count, piece + i * kPiece);
      transpose(piece, count, values + j * stride, stride);
    }
  }
}
TACEXT_SIMD_CLONES void transpose_group(const float* const* r, std::int64_t n, float* v,
                                        std::int64_t s) {
  fill_group(r, n, v, s);
}
TACEXT_SIMD_CLONES void transpose_group(const Half* const* r, std::int64_t n, float* v,
                                        std::int64_t s) {
  fill_group(r, n, v, s);
}
TACEXT_SIMD_CLONES void transpose_group(const BFloat16* const* r, std::int64_t n, float* v,
                                        std::int64_t s) {
  fill_group(r, n, v, s);
}
TACEXT_SIMD_CLONES void transpose_group(const double* const* r, std::int64_t n, double* v,
                                        std::int64_t s) {
  fill_group(r, n, v, s);
}

// A block of one class: values [kSampleGroup lanes, run steps] to coarse [run steps, kSampleGroup
// lanes], rounded to the nearest level. The clamp only guards against rounding at the very ends.
template <class Margin>
TACEXT_INLINE void quantize(const Margin* values, const Margin* shift, Margin offset,
                            Margin levels_a_unit, std::int64_t run, std::int8_t* coarse) {
  std::int8_t levels[kSampleGroup * kRun];
  for (std::int64_t i = 0; i < kSampleGroup * run; ++i) {
    const Margin level = ((values[i] - offset) - shift[i]) * levels_a_unit;
    const int rounded = static_cast<int>(level + (256 + Margin{0.5})) - 256;
    levels[i] = static_cast<std::int8_t>(std::min(std::max(rounded, -kLevels), kLevels));
  }
  for (std::int64_t step = 0; step < run; ++step)
    for (std::int64_t lane = 0; lane < kSampleGroup; ++lane)
      coarse[step * kSampleGroup + lane] = levels[lane * run + step];
}
TACEXT_SIMD_CLONES void quantize_block(const float* v, const float* s, float o, float l,
                                       std::int64_t run, std::int8_t* c) {
  quantize(v, s, o, l, run, c);
}
TACEXT_SIMD_CLONES void quantize_block(const double* v, const double* s, double o, double l,
                                       std::int64_t run, std::int8_t* c) {
  quantize(v, s, o, l, run, c);
}

// Space for `places` samples, which rows beyond the last class get as zeros.
template <class Margin>
void reserve(std::int64_t places, std::int64_t classes, Panel<Margin>& panel) {
  panel.classes = classes;
  panel.samples = places;
  panel.stride = places + kSampleGroup;  // off powers of two, which share cache sets
  const std::int64_t rows = round_up(classes, kTileClasses);
  panel.values.resize(static_cast<std::size_t>(rows * panel.stride));
  std::fill(panel.values.begin() + classes * panel.stride, panel.values.end(), Margin{0});
}

// sample(i) is the sample in place i of the panel; also asked for the padding at the rows' ends.
template <class T, class Margin, class Sample>
void fill_values(const T* logits, const Sample& sample, Panel<Margin>& panel,
                 const ParallelFor& parallel_for) {
  parallel_for(panel.stride / kSampleGroup, std::max<std::int64_t>(1, 2048 / panel.classes),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t g = begin; g < end; ++g) {
                   const T* rows[kSampleGroup];
                   for (std::int64_t i = 0; i < kSampleGroup; ++i)
                     rows[i] = logits + sample(g * kSampleGroup + i) * panel.classes;
                   transpose_group(rows, panel.classes, panel.values.data() + g * kSampleGroup,
                                   panel.stride);
                 }
               });
}

template <class Margin>
void fill_coarse(const std::vector<Margin>& shift, Panel<Margin>& panel,
                 const ParallelFor& parallel_for) {
  const std::int64_t block = panel.run * kSampleGroup;
  panel.coarse.resize(panel.values.size());
  std::fill(panel.coarse.begin() + panel.classes * panel.stride, panel.coarse.end(),
            std::int8_t{0});
  parallel_for(panel.classes, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j)
      for (std::int64_t i = 0; i < panel.samples; i += block)
        quantize_block(panel.values.data() + j * panel.stride + i, shift.data() + i,
                       panel.offset[j], panel.levels_a_unit, panel.run,
                       panel.coarse.data() + j * panel.stride + i);
  });
}

// For each class the middle of what some of the samples show; any number would do, near is better.
template <class T, class Margin>
std::vector<Margin> class_offsets(const T* logits, std::int64_t samples, std::int64_t classes) {
  std::vector<Margin> row(static_cast<std::size_t>(classes)), low, high;
  const std::int64_t step = std::max<std::int64_t>(1, samples / kOffsetSamples);
  for (std::int64_t i = 0; i < samples; i += step) {
    load_row(logits + i * classes, classes, row.data());
    if (i == 0) low = high = row;
    for (std::int64_t j = 0; j < classes; ++j) {
      low[j] = std::min(low[j], row[j]);
      high[j] = std::max(high[j], row[j]);
    }
  }
  for (std::int64_t j = 0; j < classes; ++j) low[j] = middle(low[j], high[j]);
  return low;
}

}  // namespace

template <class T, class Margin>
SampleOrder<Margin> order_samples(const T* logits, std::int64_t samples, std::int64_t classes,
                                  const ParallelFor& parallel_for) {
  SampleOrder<Margin> order;
  order.offset = class_offsets<T, Margin>(logits, samples, classes);
  std::vector<Spread<Margin>> spreads(static_cast<std::size_t>(samples));
  TopSamples<Margin> top(classes);
  std::mutex mutex;
  parallel_for(samples, std::max<std::int64_t>(1, 65536 / classes),
               [&](std::int64_t begin, std::int64_t end) {
                 std::vector<Margin> converted(static_cast<std::size_t>(classes));
                 TopSamples<Margin> own(classes);
                 for (std::int64_t i = begin; i < end; ++i) {
                   const Margin* row = converted.data();
                   if constexpr (std::is_same_v<T, Margin>)
                     row = logits + i * classes;
                   else
                     load_row(logits + i * classes, classes, converted.data());
                   spreads[i] = spread(row, order.offset.data(), classes);
                   const Margin shift = middle(spreads[i].low, spreads[i].high);
                   for (std::int64_t j = 0; j < classes; j += 64)
                     for (std::uint64_t bits = beats(row + j, shift, own.least.data() + j,
                                                     std::min<std::int64_t>(64, classes - j));
                          bits != 0; bits &= bits - 1) {
                       const std::int64_t c = j + __builtin_ctzll(bits);
                       own.add(c, row[c] - shift, i);
                     }
                 }
                 const std::lock_guard<std::mutex> lock(mutex);
                 top.merge(own);
               });
  order.top = std::move(top.sample);

  order.sample.resize(static_cast<std::size_t>(samples));
  std::iota(order.sample.begin(), order.sample.end(), 0);
  order.screened = samples;
  Margin size = 0;
  for (const Spread<Margin>& s : spreads) size = std::max(size, s.size);
  for (const Margin offset : order.offset) size = std::max(size, std::fabs(offset));
  if (size > std::numeric_limits<Margin>::max() / 8) return order;  // differences may overflow

  std::vector<std::pair<Margin, std::int64_t>> by_range;
  for (std::int64_t i = 0; i < samples; ++i)
    by_range.emplace_back((spreads[i].low - spreads[i].high) / 2, i);
  std::sort(by_range.begin(), by_range.end());
  for (std::int64_t place = 0; place < samples; ++place) {
    const auto [negative, i] = by_range[place];
    order.sample[place] = i;
    order.half_range.push_back(-negative);
    order.shift.push_back(middle(spreads[i].low, spreads[i].high));
  }
  const std::int64_t leading = round_up(samples / kLeadingShare + 1, kSampleGroup);
  if (leading < samples && order.half_range[leading] > kLeastRange<Margin> * size &&
      order.half_range[leading] > 1000 * std::numeric_limits<Margin>::min())
    order.screened = leading;
  return order;
}

template <class T, class Margin>
void margins_of_top(const T* logits, const SampleOrder<Margin>& order,
                    const MarginTile<Margin>& tile) {
  const std::int64_t classes = tile.panel.classes;
  // The top samples of the classes at `own0` against the classes at `other0`.
  const auto raise = [&](std::int64_t own0, std::int64_t other0) {
    const std::int64_t others = std::min(kTileClasses, classes - other0);
    for (std::int64_t j = own0; j < std::min(own0 + kTileClasses, classes); ++j) {
      Margin best[kTileClasses], row[kTileClasses];
      std::fill_n(best, kTileClasses, -std::numeric_limits<Margin>::infinity());
      for (std::int64_t t = 0; t < kTop; ++t) {
        const T* const logit = logits + order.top[j * kTop + t] * classes;
        const Margin own = to_float(logit[j]);
        load_row(logit + other0, others, row);
        for (std::int64_t k = 0; k < others; ++k)
          best[k] = std::max(best[k], own - row[k] + Margin{0});
      }
      for (std::int64_t k = 0; k < others; ++k) {
        Margin& entry = tile.margins[(other0 + k) * classes + j];
        entry = best[k] > entry ? best[k] : entry;
      }
    }
  };
  raise(tile.j0, tile.k0);
  if (tile.j0 != tile.k0) raise(tile.k0, tile.j0);
}

template <class T, class Margin>
void fill_panel(const T* logits, std::int64_t classes, const SampleOrder<Margin>& order,
                std::int64_t begin, std::int64_t end, bool coarse, Panel<Margin>& panel,
                const ParallelFor& parallel_for) {
  const auto place = [&](std::int64_t i) { return std::min(begin + i, end - 1); };
  std::int64_t places = round_up(end - begin, kSampleGroup);
  if (coarse) {
    const std::int64_t groups = places / kSampleGroup;
    const std::int64_t blocks = (groups + kRun - 1) / kRun;
    panel.run = (groups + blocks - 1) / blocks;
    places = blocks * panel.run * kSampleGroup;
  }
  reserve(places, classes, panel);
  fill_values(logits, [&](std::int64_t i) { return order.sample[place(i)]; }, panel, parallel_for);
  if (!coarse) return;
  panel.offset = order.offset;
  panel.levels_a_unit = kLevels / order.half_range[begin];
  std::vector<Margin> shift(static_cast<std::size_t>(places));
  for (std::int64_t i = 0; i < places; ++i) shift[i] = order.shift[place(i)];
  fill_coarse(shift, panel, parallel_for);
}

template <class T, class Margin>
void fill_panel(const T* logits, std::int64_t samples, std::int64_t classes, Panel<Margin>& panel,
                const ParallelFor& parallel_for) {
  reserve(round_up(samples, kSampleGroup), classes, panel);
  fill_values(
      logits, [&](std::int64_t i) { return std::min(i, samples - 1); }, panel, parallel_for);
}

#define TACEXT_PANELS(T, Margin)                                                                 \
  template SampleOrder<Margin> order_samples(const T*, std::int64_t, std::int64_t,               \
                                             const ParallelFor&);                                \
  template void margins_of_top(const T*, const SampleOrder<Margin>&, const MarginTile<Margin>&); \
  template void fill_panel(const T*, std::int64_t, const SampleOrder<Margin>&, std::int64_t,     \
                           std::int64_t, bool, Panel<Margin>&, const ParallelFor&);              \
  template void fill_panel(const T*, std::int64_t, std::int64_t, Panel<Margin>&,                 \
                           const ParallelFor&);
TACEXT_PANELS(float, float)
TACEXT_PANELS(Half, float)
TACEXT_PANELS(BFloat16, float)
TACEXT_PANELS(double, double)
#undef TACEXT_PANELS

}  // namespace tacext
