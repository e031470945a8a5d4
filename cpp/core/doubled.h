#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

// Sums in doubled precision: as if every step had some 106 bits, from IEEE doubles alone, so that
// the same input gives the same bits on every machine. For what cancels to less than a double
// holds.
namespace tacext {

/// The unevaluated sum high + low.
struct Doubled {
  double high = 0, low = 0;

  double value() const { return high + low; }
};

/// a + b, exactly.
inline Doubled two_sum(double a, double b) {
  const double sum = a + b, part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}

/// a * b, exactly.
inline Doubled two_product(double a, double b) {
  const double product = a * b;
  return {product, std::fma(a, b, -product)};
}

/// sum += a * b
inline void add_product(Doubled& sum, double a, double b) {
  const Doubled product = two_product(a, b), next = two_sum(sum.high, product.high);
  sum = {next.high, sum.low + (next.low + product.low)};
}

/// from - sum, rounded once.
inline double remainder_of(double from, const Doubled& sum) {
  const Doubled rest = two_sum(from, -sum.high);
  return rest.high + (rest.low - sum.low);
}

/// sum_d (a_d - b_d) * s_d
Doubled dot_difference_doubled(const double* a, const double* b, const double* s,
                               std::int64_t count);

/// out[d] = sum_i weights[i] * (base[d] - rows[i][d])
std::vector<Doubled> weighted_differences_doubled(const double* base,
                                                  const std::vector<const double*>& rows,
                                                  const double* weights, std::int64_t count);

}  // namespace tacext
