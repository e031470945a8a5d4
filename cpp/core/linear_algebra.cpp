#include "linear_algebra.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace tacext {
namespace {

constexpr std::int64_t kPanel = 8;  // rows of the packed matrix side by side: one 512-bit vector
constexpr std::int64_t kRows = 4;   // rows of the left matrix a tile takes
typedef double Vector __attribute__((vector_size(8 * kPanel)));

TACEXT_INLINE double fold(const double (&s)[kPanel]) {
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// out[r, 0..7] = left row r . panel rows, for kRows rows: four accumulators, one load and four
// broadcasts a step.
TACEXT_SIMD_CLONES void multiply_tile(const double* const (&left)[kRows], const double* panel,
                                      std::int64_t columns, double (&out)[kRows][kPanel]) {
  Vector acc[kRows] = {};
  for (std::int64_t d = 0; d < columns; ++d) {
    Vector b;
    std::memcpy(&b, panel + d * kPanel, sizeof b);
    for (std::int64_t r = 0; r < kRows; ++r) acc[r] += b * left[r][d];
  }
  std::memcpy(out, acc, sizeof out);
}

}  // namespace

TACEXT_SIMD_CLONES double dot(const double* a, const double* b, std::int64_t count) {
  double sums[kPanel] = {};
  std::int64_t i = 0;
  for (; i + kPanel <= count; i += kPanel)
    for (int lane = 0; lane < kPanel; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += a[i] * b[i];
  return fold(sums);
}

TACEXT_SIMD_CLONES double dot_difference(const double* a, const double* b, const double* s,
                                         std::int64_t count) {
  double sums[kPanel] = {};
  std::int64_t i = 0;
  for (; i + kPanel <= count; i += kPanel)
    for (int lane = 0; lane < kPanel; ++lane)
      sums[lane] += (a[i + lane] - b[i + lane]) * s[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += (a[i] - b[i]) * s[i];
  return fold(sums);
}

TACEXT_SIMD_CLONES void add_scaled(double factor, const double* x, std::int64_t count, double* y) {
  for (std::int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

PackedRows::PackedRows(const double* matrix, std::int64_t rows, std::int64_t columns)
    : rows_(rows), columns_(columns) {
  const std::int64_t panels = (rows + kPanel - 1) / kPanel;
  panels_.resize(static_cast<std::size_t>(panels * kPanel * columns));
  for (std::int64_t j = 0; j < rows; ++j) {
    double* panel = panels_.data() + (j / kPanel) * kPanel * columns + j % kPanel;
    for (std::int64_t d = 0; d < columns; ++d) panel[d * kPanel] = matrix[j * columns + d];
  }
}

void PackedRows::multiply(const double* left, std::int64_t count, std::int64_t end, double* out,
                          std::int64_t out_stride) const {
  for (std::int64_t j = 0; j < end; j += kPanel) {
    const double* panel = panels_.data() + j * columns_;
    const std::int64_t width = std::min(kPanel, end - j);
    for (std::int64_t i = 0; i < count; i += kRows) {
      const std::int64_t height = std::min(kRows, count - i);
      const double* rows[kRows];
      for (std::int64_t r = 0; r < kRows; ++r)
        rows[r] = left + (i + std::min(r, height - 1)) * columns_;
      double tile[kRows][kPanel];
      multiply_tile(rows, panel, columns_, tile);
      for (std::int64_t r = 0; r < height; ++r)
        std::copy_n(tile[r], width, out + (i + r) * out_stride + j);
    }
  }
}

std::vector<double> gram_matrix(const PackedRows& packed, const double* weight,
                                std::int64_t classes, std::int64_t latents,
                                const ParallelFor& parallel_for) {
  constexpr std::int64_t kStrip = 16;
  std::vector<double> gram(static_cast<std::size_t>(classes * classes));
  const std::int64_t strips = (classes + kStrip - 1) / kStrip;
  parallel_for(strips, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin * kStrip; i < std::min(end * kStrip, classes); i += kStrip) {
      const std::int64_t count = std::min(kStrip, classes - i);
      packed.multiply(weight + i * latents, count, i + count, gram.data() + i * classes, classes);
    }
  });
  // Below the strips the matrix is its own mirror: w_i . w_j sums the same products in one order.
  for (std::int64_t i = 0; i < classes; ++i)
    for (std::int64_t j = 0; j < i; ++j) gram[j * classes + i] = gram[i * classes + j];
  return gram;
}

}  // namespace tacext
