#include "doubled.h"

#include "simd.h"

namespace tacext {
namespace {

constexpr int kSums = 8;  // side by side: one 512-bit vector

/// high + low += (a - b) * weight
TACEXT_INLINE void accumulate(double a, double b, double weight, double& high, double& low) {
  const Doubled difference = two_sum(a, -b);
  const Doubled product = two_product(difference.high, weight);
  const Doubled next = two_sum(high, product.high);
  high = next.high;
  low += next.low + (product.low + difference.low * weight);
}

}  // namespace

TACEXT_SIMD_CLONES Doubled dot_difference_doubled(const double* a, const double* b, const double* s,
                                                  std::int64_t count) {
  double high[kSums] = {}, low[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
#pragma omp simd
    for (int lane = 0; lane < kSums; ++lane)
      accumulate(a[i + lane], b[i + lane], s[i + lane], high[lane], low[lane]);
  }
  for (int lane = 0; i < count; ++i, ++lane) accumulate(a[i], b[i], s[i], high[lane], low[lane]);
  Doubled sum;
  for (int lane = 0; lane < kSums; ++lane) {
    const Doubled next = two_sum(sum.high, high[lane]);
    sum = {next.high, sum.low + (next.low + low[lane])};
  }
  return sum;
}

TACEXT_SIMD_CLONES std::vector<Doubled> weighted_differences_doubled(
    const double* base, const std::vector<const double*>& rows, const double* weights,
    std::int64_t count) {
  std::vector<double> high(static_cast<std::size_t>(count)), low(high.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const double* const row = rows[i];
    const double weight = weights[i];
    double *const to_high = high.data(), *const to_low = low.data();
#pragma omp simd
    for (std::int64_t d = 0; d < count; ++d)
      accumulate(base[d], row[d], weight, to_high[d], to_low[d]);
  }
  std::vector<Doubled> sums;
  for (std::size_t d = 0; d < high.size(); ++d) sums.push_back({high[d], low[d]});
  return sums;
}

}  // namespace tacext
