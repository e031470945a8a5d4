#include "tacext/pairwise_margin_max.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace tacext {
namespace {

// A tile of M is kRows rows by kLanes columns of accumulators, held in registers while the samples
// of a block stream by:
//
//        columns j .. j+kLanes-1 of one sample     (one load)
//   k    acc[0][.] = max(acc[0][.], z_j - z_k)
//   k+1  acc[1][.] = max(acc[1][.], z_j - z_k+1)   (z_k broadcast)
//   ...
constexpr std::int64_t kRows = 4;
constexpr std::int64_t kBlockBytes = 128 * 1024;  // a block of samples stays in the L2 cache

template <class Margin>
constexpr std::int64_t kLanes = 64 / sizeof(Margin);

template <class Margin>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(64)));
};

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One tile over `samples` rows of `block`, whose rows are `stride` values long and padded to lanes.
template <class Margin>
TACEXT_INLINE void tile_max(const Margin* block, std::int64_t samples, std::int64_t stride,
                            std::int64_t k, std::int64_t j,
                            typename Lanes<Margin>::type (&acc)[kRows]) {
  using Vector = typename Lanes<Margin>::type;
  const Margin* row = block;
  for (std::int64_t i = 0; i < samples; ++i, row += stride) {
    Vector z;
    __builtin_memcpy(&z, row + j, sizeof z);
    for (std::int64_t r = 0; r < kRows; ++r) {
      const Vector difference = z - row[k + r] + Margin{0};  // -0 + 0 is +0: one zero, any order
      acc[r] = difference > acc[r] ? difference : acc[r];
    }
  }
}

// Rows [k, k_end) of M over one block of samples.
template <class Margin>
TACEXT_INLINE void block_max(const Margin* block, std::int64_t samples, std::int64_t stride,
                             std::int64_t classes, std::int64_t k_begin, std::int64_t k_end,
                             Margin* margins) {
  using Vector = typename Lanes<Margin>::type;
  constexpr std::int64_t lanes = kLanes<Margin>;
  for (std::int64_t k = k_begin; k < k_end; k += kRows) {
    const std::int64_t rows = std::min(kRows, k_end - k);
    for (std::int64_t j = 0; j < classes; j += lanes) {
      const std::size_t bytes = std::min(lanes, classes - j) * sizeof(Margin);
      Vector acc[kRows];
      for (Vector& a : acc) a = Vector{} - std::numeric_limits<Margin>::infinity();
      for (std::int64_t r = 0; r < rows; ++r)
        __builtin_memcpy(&acc[r], margins + (k + r) * classes + j, bytes);
      tile_max<Margin>(block, samples, stride, k, j, acc);
      for (std::int64_t r = 0; r < rows; ++r)
        __builtin_memcpy(margins + (k + r) * classes + j, &acc[r], bytes);
    }
  }
}

TACEXT_SIMD_CLONES void block_max_f32(const float* block, std::int64_t samples, std::int64_t stride,
                                      std::int64_t classes, std::int64_t k_begin,
                                      std::int64_t k_end, float* margins) {
  block_max<float>(block, samples, stride, classes, k_begin, k_end, margins);
}

TACEXT_SIMD_CLONES void block_max_f64(const double* block, std::int64_t samples,
                                      std::int64_t stride, std::int64_t classes,
                                      std::int64_t k_begin, std::int64_t k_end, double* margins) {
  block_max<double>(block, samples, stride, classes, k_begin, k_end, margins);
}

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

// x - x is 0 for a finite x and NaN for the rest, so one running sum tells without a branch.
template <class T>
TACEXT_INLINE bool row_is_finite(const T* row, std::int64_t count) {
  using Value = decltype(to_float(T{}));
  Value sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = 0; j < count; ++j) {
    const Value value = to_float(row[j]);
    sum += value - value;
  }
  return sum == 0;
}

TACEXT_SIMD_CLONES bool finite(const float* r, std::int64_t n) { return row_is_finite(r, n); }
TACEXT_SIMD_CLONES bool finite(const double* r, std::int64_t n) { return row_is_finite(r, n); }
TACEXT_SIMD_CLONES bool finite(const Half* r, std::int64_t n) { return row_is_finite(r, n); }
TACEXT_SIMD_CLONES bool finite(const BFloat16* r, std::int64_t n) { return row_is_finite(r, n); }

}  // namespace

template <class T>
MatrixIndex find_non_finite(const T* values, std::int64_t rows, std::int64_t columns,
                            const ParallelFor& parallel_for) {
  MatrixIndex first;
  std::mutex mutex;
  const std::int64_t grain = std::max<std::int64_t>(1, 65536 / std::max<std::int64_t>(1, columns));
  parallel_for(rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* row = values + i * columns;
      if (finite(row, columns)) continue;
      const T* bad =
          std::find_if(row, row + columns, [](T value) { return !std::isfinite(to_float(value)); });
      const std::lock_guard<std::mutex> lock(mutex);
      if (first.row < 0 || i < first.row) first = {i, bad - row};
      return;
    }
  });
  return first;
}

template <class T, class Margin>
void pairwise_margin_max(const T* logits, std::int64_t samples, std::int64_t classes,
                         Margin* margins, const ParallelFor& parallel_for) {
  // Padding: whole lanes to the right for z_j, and kRows - 1 more for the broadcasts of the last k.
  const std::int64_t stride = round_up(classes, kLanes<Margin>) + kLanes<Margin>;
  const std::int64_t block_samples = std::clamp<std::int64_t>(
      kBlockBytes / (stride * static_cast<std::int64_t>(sizeof(Margin))), 8, 256);
  const std::int64_t row_tiles = (classes + kRows - 1) / kRows;
  const std::int64_t work_per_tile = std::max<std::int64_t>(1, kRows * classes * samples);
  // Threads share the rows of M, never a row: no merge, and no order that could matter.
  parallel_for(
      row_tiles, std::max<std::int64_t>(1, 262144 / work_per_tile),
      [&](std::int64_t begin, std::int64_t end) {
        std::vector<Margin> block(static_cast<std::size_t>(block_samples * stride), Margin{0});
        for (std::int64_t i = 0; i < samples; i += block_samples) {
          const std::int64_t count = std::min(block_samples, samples - i);
          for (std::int64_t r = 0; r < count; ++r)
            load_row(logits + (i + r) * classes, classes, block.data() + r * stride);
          const std::int64_t k_end = std::min(end * kRows, classes);
          if constexpr (std::is_same_v<Margin, float>)
            block_max_f32(block.data(), count, stride, classes, begin * kRows, k_end, margins);
          else
            block_max_f64(block.data(), count, stride, classes, begin * kRows, k_end, margins);
        }
      });
}

template MatrixIndex find_non_finite(const float*, std::int64_t, std::int64_t, const ParallelFor&);
template MatrixIndex find_non_finite(const double*, std::int64_t, std::int64_t, const ParallelFor&);
template MatrixIndex find_non_finite(const Half*, std::int64_t, std::int64_t, const ParallelFor&);
template MatrixIndex find_non_finite(const BFloat16*, std::int64_t, std::int64_t,
                                     const ParallelFor&);
template void pairwise_margin_max(const float*, std::int64_t, std::int64_t, float*,
                                  const ParallelFor&);
template void pairwise_margin_max(const Half*, std::int64_t, std::int64_t, float*,
                                  const ParallelFor&);
template void pairwise_margin_max(const BFloat16*, std::int64_t, std::int64_t, float*,
                                  const ParallelFor&);
template void pairwise_margin_max(const double*, std::int64_t, std::int64_t, double*,
                                  const ParallelFor&);

}  // namespace tacext
