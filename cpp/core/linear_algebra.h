#pragma once

#include <cstdint>
#include <vector>

#include "tacext/parallel.h"

// Double-precision kernels with a summation order that depends on the sizes alone.
namespace tacext {

double dot(const double* a, const double* b, std::int64_t count);

/// The largest |a_i|, 0 without any; a NaN is passed over.
double largest_magnitude(const double* a, std::int64_t count);

/// y += factor * x
void add_scaled(double factor, const double* x, std::int64_t count, double* y);

/// sum_d (a_d - b_d) * s_d: differences first, so that a component common to a and b costs nothing.
double dot_difference(const double* a, const double* b, const double* s, std::int64_t count);

/// sum_d |(a_d - b_d) * s_d|
double dot_difference_size(const double* a, const double* b, const double* s, std::int64_t count);

/// to = from * 2^exponent: exact, but for what leaves the range of a double. `to` may be `from`.
void multiply_by_power_of_two(const double* from, std::int64_t count, int exponent, double* to);

/// Entry by entry: sum += x, low = min(low, x), high = max(high, x).
void gather_range(const double* x, std::int64_t count, double* sum, double* low, double* high);

/// out[j] = sum_i weights[i] * (base[j] - rows[i][j]), j in [0, count)
void weighted_differences(const double* base, const std::vector<const double*>& rows,
                          const double* weights, std::int64_t count, double* out);

/// Columns that subtract_products works on.
constexpr std::int64_t kProductColumns = 32;
/// Rows that subtract_products works on.
constexpr std::int64_t kProductRows = 4;

/// block[r][c] -= sum_i left[r][i * left_step] * right[i * right_stride + c], i in [0, count), for
/// kProductRows rows of stride block_stride and kProductColumns columns: what a blocked Cholesky
/// factorisation spends its time on.
void subtract_products(const double* const (&left)[kProductRows], std::int64_t left_step,
                       const double* right, std::int64_t right_stride, std::int64_t count,
                       double* block, std::int64_t block_stride);

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
