#pragma once

#include <cstdint>
#include <vector>

#include "tacext/parallel.h"

// Double-precision kernels with a summation order that depends on the sizes alone.
namespace tacext {

double dot(const double* a, const double* b, std::int64_t count);

/// y += factor * x
void add_scaled(double factor, const double* x, std::int64_t count, double* y);

/// sum_d (a_d - b_d) * s_d: differences first, so that a component common to a and b costs nothing.
double dot_difference(const double* a, const double* b, const double* s, std::int64_t count);

/// A row-major [rows, columns] matrix, repacked so that products with its transpose stream.
class PackedRows {
 public:
  PackedRows(const double* matrix, std::int64_t rows, std::int64_t columns);

  /// out[i, j] = left[i, :] . row j of this, for i in [0, count) and j in [0, end); `out` has
  /// `out_stride` values a row. Each value is one sequential sum, whatever the blocking.
  void multiply(const double* left, std::int64_t count, std::int64_t end, double* out,
                std::int64_t out_stride) const;

 private:
  std::int64_t rows_, columns_;
  std::vector<double> panels_;
};

/// K = W W^T, exactly symmetric.
std::vector<double> gram_matrix(const PackedRows& packed, const double* weight,
                                std::int64_t classes, std::int64_t latents,
                                const ParallelFor& parallel_for);

}  // namespace tacext
