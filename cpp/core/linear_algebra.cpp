#include "linear_algebra.h"

#include <algorithm>
#include <cmath>

#include "balanced_for.h"
#include "simd.h"

namespace tacext {
namespace {

constexpr std::int64_t kPanel = 16;  // rows of the packed matrix side by side
constexpr int kSums = 8;             // of a dot product, side by side: one 512-bit vector

TACEXT_INLINE double fold(const double (&s)[kSums]) {
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

}  // namespace

// The same text for every instruction set, with the register tile that fills its registers.
#if TACEXT_SIMD_TARGETS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
#define TACEXT_KERNEL_BYTES 64
constexpr int kBytes = TACEXT_KERNEL_BYTES, kTileRows = 8, kTileVectors = 2;
#include "products.inl"
#undef TACEXT_KERNEL_BYTES
}  // namespace v4
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define TACEXT_KERNEL_BYTES 32
constexpr int kBytes = TACEXT_KERNEL_BYTES, kTileRows = 4, kTileVectors = 2;
#include "products.inl"
#undef TACEXT_KERNEL_BYTES
}  // namespace v3
#pragma GCC pop_options
#endif
namespace baseline {
#define TACEXT_KERNEL_BYTES 16
constexpr int kBytes = TACEXT_KERNEL_BYTES, kTileRows = 2, kTileVectors = 4;
#include "products.inl"
#undef TACEXT_KERNEL_BYTES
}  // namespace baseline

namespace {

void multiply_panel(const double* const* left, std::int64_t height, const double* panel,
                    std::int64_t columns, double* out, std::int64_t out_stride,
                    std::int64_t width) {
#if TACEXT_SIMD_TARGETS
  if (simd_width() == 64)
    return v4::multiply_panel(left, height, panel, columns, out, out_stride, width);
  if (simd_width() == 32)
    return v3::multiply_panel(left, height, panel, columns, out, out_stride, width);
#endif
  baseline::multiply_panel(left, height, panel, columns, out, out_stride, width);
}

}  // namespace

void subtract_products(const double* const (&left)[kProductRows], std::int64_t left_step,
                       const double* right, std::int64_t right_stride, std::int64_t count,
                       double* block, std::int64_t block_stride) {
#if TACEXT_SIMD_TARGETS
  if (simd_width() == 64)
    return v4::subtract_products(left, left_step, right, right_stride, count, block, block_stride);
  if (simd_width() == 32)
    return v3::subtract_products(left, left_step, right, right_stride, count, block, block_stride);
#endif
  baseline::subtract_products(left, left_step, right, right_stride, count, block, block_stride);
}

TACEXT_SIMD_CLONES double dot(const double* a, const double* b, std::int64_t count) {
  double sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += a[i] * b[i];
  return fold(sums);
}

TACEXT_SIMD_CLONES double largest_magnitude(const double* a, std::int64_t count) {
  double largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < count; ++i)
    largest = std::fabs(a[i]) > largest ? std::fabs(a[i]) : largest;
  return largest;
}

TACEXT_SIMD_CLONES double dot_difference(const double* a, const double* b, const double* s,
                                         std::int64_t count) {
  double sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int lane = 0; lane < kSums; ++lane)
      sums[lane] += (a[i + lane] - b[i + lane]) * s[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += (a[i] - b[i]) * s[i];
  return fold(sums);
}

TACEXT_SIMD_CLONES double dot_difference_size(const double* a, const double* b, const double* s,
                                              std::int64_t count) {
  double sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int lane = 0; lane < kSums; ++lane)
      sums[lane] += std::fabs((a[i + lane] - b[i + lane]) * s[i + lane]);
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += std::fabs((a[i] - b[i]) * s[i]);
  return fold(sums);
}

TACEXT_SIMD_CLONES void add_scaled(double factor, const double* x, std::int64_t count, double* y) {
  for (std::int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

TACEXT_SIMD_CLONES void multiply_by_power_of_two(const double* from, std::int64_t count,
                                                 int exponent, double* to) {
  constexpr int kFactor = 1000;  // up to here 2^exponent is itself a double
  if (exponent >= -kFactor && exponent <= kFactor) {
    const double factor = std::ldexp(1.0, exponent);
    for (std::int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = std::ldexp(from[i], exponent);
  }
}

TACEXT_SIMD_CLONES void gather_range(const double* x, std::int64_t count, double* sum, double* low,
                                     double* high) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    sum[i] += x[i];
    low[i] = x[i] < low[i] ? x[i] : low[i];
    high[i] = x[i] > high[i] ? x[i] : high[i];
  }
}

// Four rows a pass: as many streams as the prefetcher follows, and a quarter of the result's
// traffic.
TACEXT_SIMD_CLONES void weighted_differences(const double* base,
                                             const std::vector<const double*>& rows,
                                             const double* weights, std::int64_t count,
                                             double* out) {
  std::fill_n(out, count, 0.0);
  std::size_t i = 0;
  for (; i + 4 <= rows.size(); i += 4) {
    const double *const r0 = rows[i], *const r1 = rows[i + 1], *const r2 = rows[i + 2],
                        *const r3 = rows[i + 3];
    const double w0 = weights[i], w1 = weights[i + 1], w2 = weights[i + 2], w3 = weights[i + 3];
#pragma omp simd
    for (std::int64_t j = 0; j < count; ++j)
      out[j] =
          (((out[j] + w0 * (base[j] - r0[j])) + w1 * (base[j] - r1[j])) + w2 * (base[j] - r2[j])) +
          w3 * (base[j] - r3[j]);
  }
  for (; i < rows.size(); ++i) {
    const double* const row = rows[i];
    const double weight = weights[i];
#pragma omp simd
    for (std::int64_t j = 0; j < count; ++j) out[j] += weight * (base[j] - row[j]);
  }
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
  std::vector<const double*> rows;
  for (std::int64_t i = 0; i < count; ++i) rows.push_back(left + i * columns_);
  for (std::int64_t j = 0; j < end; j += kPanel)
    multiply_panel(rows.data(), count, panels_.data() + j * columns_, columns_, out + j, out_stride,
                   std::min(kPanel, end - j));
}

std::vector<double> gram_matrix(const PackedRows& packed, const double* weight,
                                std::int64_t classes, std::int64_t latents,
                                const ParallelFor& parallel_for) {
  constexpr std::int64_t kStrip = 16;
  std::vector<double> gram(static_cast<std::size_t>(classes * classes));
  const std::int64_t strips = (classes + kStrip - 1) / kStrip;
  balanced_for(strips, parallel_for, [&](std::int64_t strip) {
    const std::int64_t i = (strips - 1 - strip) * kStrip;  // the long ones first
    const std::int64_t count = std::min(kStrip, classes - i);
    packed.multiply(weight + i * latents, count, i + count, gram.data() + i * classes, classes);
  });
  // Below the strips the matrix is its own mirror: w_i . w_j sums the same products in one order.
  for (std::int64_t i = 0; i < classes; ++i)
    for (std::int64_t j = 0; j < i; ++j) gram[j * classes + i] = gram[i * classes + j];
  return gram;
}

}  // namespace tacext
