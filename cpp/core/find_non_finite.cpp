#include "tacext/find_non_finite.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "simd.h"

namespace tacext {
namespace {

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
  // Whole runs of values at a time: a row of ten logits is too short to fill vectors.
  constexpr std::int64_t kRun = 4096;
  const std::int64_t total = rows * columns;
  const std::int64_t runs = (total + kRun - 1) / kRun;
  std::int64_t first = total;
  std::mutex mutex;
  parallel_for(runs, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T* const run = values + r * kRun;
      const std::int64_t count = std::min(kRun, total - r * kRun);
      if (finite(run, count)) continue;
      const T* const bad =
          std::find_if(run, run + count, [](T value) { return !std::isfinite(to_float(value)); });
      const std::lock_guard<std::mutex> lock(mutex);
      first = std::min(first, static_cast<std::int64_t>(bad - values));
      return;
    }
  });
  if (first == total) return {};
  return {first / columns, first % columns};
}

template MatrixIndex find_non_finite(const float*, std::int64_t, std::int64_t, const ParallelFor&);
template MatrixIndex find_non_finite(const double*, std::int64_t, std::int64_t, const ParallelFor&);
template MatrixIndex find_non_finite(const Half*, std::int64_t, std::int64_t, const ParallelFor&);
template MatrixIndex find_non_finite(const BFloat16*, std::int64_t, std::int64_t,
                                     const ParallelFor&);

}  // namespace tacext
