// The kernels of margin_tiles.cpp, for one instruction set: kBytes is its vector register, kJ x kK
// the register tile that fills its registers.

constexpr std::int64_t kScreenSamples = 512;  // between two looks at the accumulators

#include "lanes.inl"

using Coarse = Lanes<std::int8_t>::type;

// The register tile: kJ classes j by kK classes k, samples along the lanes.
//
//                  k        k+1      ..
//      j        hi,lo    hi,lo             hi = max over samples of  z_j - z_k   -> M[k, j]
//      j+1      hi,lo    hi,lo             lo = min over samples of  z_j - z_k   -> -M[j, k]
//      ..
//
// One subtraction serves both entries of a pair: three operations for two.
template <class T>
struct Extremes {
  using Vector = typename Lanes<T>::type;
  static constexpr std::int64_t lanes = kBytes / sizeof(T);
  Vector hi[kJ][kK], lo[kJ][kK];

  // Every loop over j and k is unrolled to the end: an index that is not a constant would send the
  // accumulators to memory.
  TACEXT_INLINE void reset(T lowest, T highest) {
#pragma GCC unroll 4
    for (int j = 0; j < kJ; ++j)
#pragma GCC unroll 4
      for (int k = 0; k < kK; ++k) {
        hi[j][k] = Vector{} + lowest;
        lo[j][k] = Vector{} + highest;
      }
  }

  TACEXT_INLINE void add(const T* zj, const T* zk, std::int64_t stride, std::int64_t samples) {
    for (std::int64_t i = 0; i < samples; i += lanes) {
      Vector a[kJ];
#pragma GCC unroll 4
      for (int j = 0; j < kJ; ++j) load(a[j], zj + j * stride + i);
#pragma GCC unroll 4
      for (int k = 0; k < kK; ++k) {
        Vector b;
        load(b, zk + k * stride + i);
#pragma GCC unroll 4
        for (int j = 0; j < kJ; ++j) {
          const Vector d = a[j] - b;
          hi[j][k] = d > hi[j][k] ? d : hi[j][k];
          lo[j][k] = d < lo[j][k] ? d : lo[j][k];
        }
      }
    }
  }
};

// -0 + 0 is +0: the sign of a zero does not depend on the order of the samples.
template <class Margin>
TACEXT_INLINE void raise(Margin& entry, Margin difference) {
  difference += Margin{0};
  if (difference > entry) entry = difference;
}

// The register tile at classes j and k, samples [begin, end).
template <class Margin>
void direct(const MarginTile<Margin>& tile, std::int64_t j, std::int64_t k, std::int64_t begin,
            std::int64_t end) {
  constexpr Margin infinity = std::numeric_limits<Margin>::infinity();
  const Panel<Margin>& panel = tile.panel;
  const std::int64_t classes = panel.classes;
  const std::int64_t j_end = std::min(tile.j0 + kTileClasses, classes);
  const std::int64_t k_end = std::min(tile.k0 + kTileClasses, classes);
  Extremes<Margin> extremes;
  extremes.reset(-infinity, infinity);
  const Margin* const values = panel.values.data() + begin;
  extremes.add(values + j * panel.stride, values + k * panel.stride, panel.stride, end - begin);
#pragma GCC unroll 4
  for (int a = 0; a < kJ; ++a)
#pragma GCC unroll 4
    for (int b = 0; b < kK; ++b) {
      if (j + a >= j_end || k + b >= k_end) continue;
      raise(tile.margins[(k + b) * classes + j + a], largest<Margin>(extremes.hi[a][b]));
      raise(tile.margins[(j + a) * classes + k + b], largest<Margin>(-extremes.lo[a][b]));
    }
}

/// body(a, b) for every register tile, at classes j0 + a and k0 + b. In a tile on the diagonal the
/// mirror image does those below it.
template <class Margin, class Body>
TACEXT_INLINE void for_register_tiles(const MarginTile<Margin>& tile, const Body& body) {
  const std::int64_t rows = std::min(kTileClasses, tile.panel.classes - tile.j0);
  const std::int64_t columns = std::min(kTileClasses, tile.panel.classes - tile.k0);
  for (std::int64_t a = 0; a < rows; a += kJ)
    for (std::int64_t b = 0; b < columns; b += kK)
      if (tile.j0 + a < tile.k0 + b + kK) body(a, b);
}

template <class Margin>
void direct(const MarginTile<Margin>& tile) {
  for_register_tiles(tile, [&](std::int64_t a, std::int64_t b) {
    direct(tile, tile.j0 + a, tile.k0 + b, 0, tile.panel.samples);
  });
}

// ---- screening ----------------------------------------------------------------------------------

// A sample can beat the entry M only if its coarse difference exceeds the bound:
//   z_j - z_k = o_j - o_k + (q_j - q_k + e) / levels_a_unit,  |e| <= 1 and a little for rounding,
// so z_j - z_k > M needs q_j - q_k > (M - (o_j - o_k)) levels_a_unit - 1 - a little.
constexpr float kRounding = 0.05f;  // make_panel sees to it that rounding stays far below
constexpr int kNever = 2 * kLevels;
constexpr int kAlways = -2 * kLevels - 1;

template <class Margin>
TACEXT_INLINE std::int8_t coarse_bound(Margin entry, Margin offset, Margin levels_a_unit) {
  Margin levels = (entry - offset) * levels_a_unit - (1 + Margin{kRounding});
  levels = levels > kAlways ? levels : Margin{kAlways};
  levels = levels < kNever ? levels : Margin{kNever};
  return static_cast<std::int8_t>(static_cast<int>(levels + 256) - 256);  // rounds down
}

// The bounds of a tile: high[j][k] for M[k, j], low[j][k] for M[j, k].
struct Bounds {
  std::int8_t high[kTileClasses][kTileClasses];
  std::int8_t low[kTileClasses][kTileClasses];
};

// The lanes of one accumulator that need a look: above the bound, and near enough to the largest
// lane that the other's samples cannot be known to lie below (each is off by 1 and a little).
TACEXT_INLINE std::uint64_t lanes_to_evaluate(const Coarse& extreme, std::int8_t bound) {
  const std::uint64_t above = lanes_above<std::int8_t>(extreme, bound);
  if ((above & (above - 1)) == 0) return above;  // none, or one
  const std::int8_t near = static_cast<std::int8_t>(largest<std::int8_t>(extreme) - 3);
  return near > bound ? lanes_above<std::int8_t>(extreme, near) : above;
}

// Whether any entry of the register tile has a lane above its bound; then masks[2e] has those of
// M[k, j] and masks[2e + 1] those of M[j, k], e = j * kK + k.
TACEXT_INLINE bool exceeding(const Extremes<std::int8_t>& extremes, const std::int8_t* high,
                             const std::int8_t* low, std::uint64_t* masks) {
  std::uint64_t all[kJ] = {};
#pragma GCC unroll 4
  for (int j = 0; j < kJ; ++j)
#pragma GCC unroll 4
    for (int k = 0; k < kK; ++k)
      all[j] |= lanes_above<std::int8_t>(extremes.hi[j][k], high[j * kTileClasses + k]) |
                lanes_above<std::int8_t>(-extremes.lo[j][k], low[j * kTileClasses + k]);
  std::uint64_t any = 0;
  for (std::uint64_t row : all) any |= row;
  if (__builtin_expect(any == 0, 1)) return false;
  __builtin_memset(masks, 0, 2 * kJ * kK * sizeof *masks);
#pragma GCC unroll 4
  for (int j = 0; j < kJ; ++j) {
    if (all[j] == 0) continue;
#pragma GCC unroll 4
    for (int k = 0; k < kK; ++k) {
      const int e = j * kK + k;
      masks[2 * e] = lanes_to_evaluate(extremes.hi[j][k], high[j * kTileClasses + k]);
      masks[2 * e + 1] = lanes_to_evaluate(-extremes.lo[j][k], low[j * kTileClasses + k]);
    }
  }
  return true;
}

template <class Margin>
TACEXT_INLINE void set_bounds(const MarginTile<Margin>& tile, Bounds& bounds) {
  const Panel<Margin>& panel = tile.panel;
  const std::int64_t classes = panel.classes;
  const std::int64_t rows = std::min(kTileClasses, classes - tile.j0);
  const std::int64_t columns = std::min(kTileClasses, classes - tile.k0);
  const Margin* const offset_j = panel.offset.data() + tile.j0;
  const Margin* const offset_k = panel.offset.data() + tile.k0;
  __builtin_memset(&bounds, kNever, sizeof bounds);
  for (std::int64_t a = 0; a < rows; ++a) {
    const Margin* const mirror = tile.margins + (tile.j0 + a) * classes + tile.k0;
    for (std::int64_t b = 0; b < columns; ++b)
      bounds.low[a][b] = coarse_bound(mirror[b], offset_k[b] - offset_j[a], panel.levels_a_unit);
  }
  std::int8_t transposed[kTileClasses][kTileClasses];
  for (std::int64_t b = 0; b < columns; ++b) {
    const Margin* const entries = tile.margins + (tile.k0 + b) * classes + tile.j0;
    for (std::int64_t a = 0; a < rows; ++a)
      transposed[b][a] = coarse_bound(entries[a], offset_j[a] - offset_k[b], panel.levels_a_unit);
  }
  for (std::int64_t a = 0; a < rows; ++a)
    for (std::int64_t b = 0; b < columns; ++b) bounds.high[a][b] = transposed[b][a];
  if (tile.j0 == tile.k0)  // z_j - z_j is known
    for (std::int64_t a = 0; a < kTileClasses; ++a) {
      bounds.high[a][a] = bounds.low[a][a] = kNever;
    }
}

// Runs of kRun samples that might raise margins[k, j]. They are gathered first and evaluated
// together, so that the processor waits for many of their values at once.
struct Candidates {
  static constexpr int kMost = 1024;
  struct Candidate {
    std::int32_t j, k;
    std::int64_t first;
  };
  Candidate list[kMost];
  int count = 0;
};

template <class Margin>
TACEXT_NOINLINE void evaluate(const MarginTile<Margin>& tile, Candidates& candidates) {
  using Fine = typename Lanes<Margin>::type;
  const Panel<Margin>& panel = tile.panel;
  for (int c = 0; c < candidates.count; ++c) {
    const auto [j, k, first] = candidates.list[c];
    const Margin* const zj = panel.values.data() + j * panel.stride + first;
    const Margin* const zk = panel.values.data() + k * panel.stride + first;
    Fine highest = Fine{} - std::numeric_limits<Margin>::infinity();
    for (std::int64_t i = 0; i < kRun; i += kBytes / sizeof(Margin)) {
      Fine x, y;
      load(x, zj + i);
      load(y, zk + i);
      const Fine d = x - y;
      highest = d > highest ? d : highest;
    }
    raise(tile.margins[k * panel.classes + j], largest<Margin>(highest));
  }
  candidates.count = 0;
}

// The lanes of an accumulator stand for kRun samples each, side by side among the values (see
// Panel): margins[k, j] needs a look at those of the lanes in `mask`.
template <class Margin>
TACEXT_INLINE void gather(const MarginTile<Margin>& tile, std::int64_t j, std::int64_t k,
                          std::int64_t begin, std::uint64_t mask, Candidates& candidates) {
  const Panel<Margin>& panel = tile.panel;
  for (; mask != 0; mask &= mask - 1)
    for (std::int64_t lane = __builtin_ctzll(mask); lane < kSampleGroup; lane += kBytes) {
      const std::int64_t first = begin + lane * panel.run;
      __builtin_prefetch(panel.values.data() + j * panel.stride + first);
      __builtin_prefetch(panel.values.data() + k * panel.stride + first);
      if (candidates.count == Candidates::kMost) evaluate(tile, candidates);
      candidates.list[candidates.count++] = {static_cast<std::int32_t>(j),
                                             static_cast<std::int32_t>(k), first};
    }
}

// The register tile at classes j0 + a and k0 + b, one block of the panel.
template <class Margin>
void screen(const MarginTile<Margin>& tile, std::int64_t a, std::int64_t b, std::int64_t begin,
            const Bounds& bounds, Candidates& candidates) {
  constexpr int kMany = 4 * 2 * kJ * kK;  // four an entry: then all samples are as cheap
  const Panel<Margin>& panel = tile.panel;
  const std::int64_t j = tile.j0 + a, k = tile.k0 + b;
  const std::int64_t block = panel.run * kSampleGroup;
  const std::int8_t* const coarse = panel.coarse.data() + begin;
  Extremes<std::int8_t> extremes;
  extremes.reset(-2 * kLevels, 2 * kLevels);
  extremes.add(coarse + j * panel.stride, coarse + k * panel.stride, panel.stride, block);
  std::uint64_t masks[2 * kJ * kK];
  if (!exceeding(extremes, &bounds.high[a][b], &bounds.low[a][b], masks)) return;
  int lanes = 0;
  for (const std::uint64_t mask : masks) lanes += __builtin_popcountll(mask);
  if (lanes > kMany) return direct(tile, j, k, begin, begin + block);
  for (int e = 0; e < kJ * kK; ++e) {
    gather(tile, j + e / kK, k + e % kK, begin, masks[2 * e], candidates);
    gather(tile, k + e % kK, j + e / kK, begin, masks[2 * e + 1], candidates);
  }
}

template <class Margin>
void screened(const MarginTile<Margin>& tile) {
  const Panel<Margin>& panel = tile.panel;
  Bounds bounds;
  Candidates candidates;
  for (std::int64_t begin = 0; begin < panel.samples; begin += panel.run * kSampleGroup) {
    set_bounds(tile, bounds);
    for_register_tiles(tile, [&](std::int64_t a, std::int64_t b) {
      screen(tile, a, b, begin, bounds, candidates);
    });
    evaluate(tile, candidates);
  }
}
