#pragma once

#include <cstdint>
#include <new>
#include <vector>

namespace tacext {

/// Classes a side of a tile of M; every kernel's register tile divides it.
constexpr std::int64_t kTileClasses = 48;
/// Samples come in whole groups: the values of the widest vector of 8-bit integers.
constexpr std::int64_t kSampleGroup = 64;
/// Quantized logits lie in [-kLevels, kLevels], their differences in twice that.
constexpr int kLevels = 63;
/// Most samples that one lane of a vector of 8-bit integers stands for.
constexpr std::int64_t kRun = 16;

/// Vectors that start at a cache line, so that a run of 16 floats is one, and are not cleared when
/// they grow: all of a panel is written once.
template <class T>
struct CacheLineAllocator {
  using value_type = T;
  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}
  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  template <class U>
  void construct(U* place) {
    ::new (static_cast<void*>(place)) U;
  }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, std::align_val_t{64}); }
  template <class U>
  bool operator==(const CacheLineAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const CacheLineAllocator<U>&) const {
    return false;
  }
};
template <class T>
using AlignedVector = std::vector<T, CacheLineAllocator<T>>;

/// Some samples' logits, class by class, so that a vector holds one class of many samples. The
/// number of samples is a multiple of kSampleGroup (a sample repeated changes no maximum), the
/// number of rows one of kTileClasses (rows beyond the last class are zeros).
template <class Margin>
struct Panel {
  std::int64_t classes = 0;
  std::int64_t samples = 0;
  std::int64_t stride = 0;       // of a class's row, in values
  AlignedVector<Margin> values;  // [rows, stride]

  /// For margins_screened each sample has a coarse copy as well:
  ///   values[j, i] = offset[j] + shift_i + (coarse[j, place(i)] + e) / levels_a_unit,  |e| <= 1/2
  /// They come in blocks of kSampleGroup runs of `run` samples, run <= kRun, and a block's place is
  ///   place(b + lane * run + step) = b + step * kSampleGroup + lane,
  /// so that a lane of a maximum over the steps leads to samples that are neighbours among the
  /// values. kRun values may be read from the start of any run.
  std::int64_t run = 0;
  AlignedVector<std::int8_t> coarse;  // [rows, stride]
  std::vector<Margin> offset;         // [rows]
  Margin levels_a_unit = 0;
};

/// A square of M, and its mirror image: entries [k, j] and [j, k] for j in [j0, j0 + kTileClasses),
/// k likewise. One thread at a time works on a tile; tiles with j0 <= k0 cover M.
template <class Margin>
struct MarginTile {
  const Panel<Margin>& panel;
  std::int64_t j0, k0;
  Margin* margins;  // M, [classes, classes]
};

/// margins[k, j] = max(margins[k, j], max_i (values[j, i] - values[k, i]))
void margins_direct(const MarginTile<float>& tile);
void margins_direct(const MarginTile<double>& tile);

/// The same, by way of the samples' coarse copies: a difference of 8-bit integers bounds the true
/// one from above, and only what could beat the entry so far is evaluated. Exactly the same result.
void margins_screened(const MarginTile<float>& tile);
void margins_screened(const MarginTile<double>& tile);

}  // namespace tacext
