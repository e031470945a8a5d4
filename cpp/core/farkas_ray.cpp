#include "farkas_ray.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "doubled.h"

namespace tacext {
namespace {

// The reciprocal of the bound on |s|, in natural units.
constexpr double kRayTolerance = 1e-13;

/// At least |sum_j l_j a_j| of the rows as they were given, in the unit of the scaled ones: what
/// might have underflowed is added. 0 only where the listed rows equal row k.
double length_of_sum(const HeadGeometry& head, std::int64_t k, const std::vector<std::int64_t>& js,
                     const std::vector<double>& weights) {
  const double small = std::ldexp(1.0, -900);  // below it a product may lose its low half
  const double lost = std::ldexp(1.0, -500);   // more than squares that underflowed
  std::vector<const double*> rows;
  for (std::int64_t j : js) rows.push_back(head.given_row(j));
  const double* const own = head.given_row(k);
  const std::vector<Doubled> sums =
      weighted_differences_doubled(own, rows, weights.data(), head.latents());
  double squares = 0;
  bool equal = true;
  for (std::int64_t d = 0; d < head.latents(); ++d) {
    double largest = 0;
    bool same = true;
    for (const double* row : rows) {
      same = same && own[d] == row[d];
      largest = std::max(largest, std::fabs(own[d] - row[d]));
    }
    if (same) continue;
    equal = false;
    const double sum = largest < small ? largest : std::fabs(sums[d].value());
    const double entry = head.in_scaled_unit(sum, d);
    squares += entry * entry;
  }
  return equal ? 0 : std::sqrt(squares) + lost;
}

}  // namespace

RayProof prove_unreachable(const HeadGeometry& head, std::int64_t k, const double* margins,
                           const std::vector<double>& squared_lengths,
                           const std::vector<double>& ray) {
  std::vector<std::int64_t> constraints;
  std::vector<double> weights;
  Doubled value;
  double size = 0, lengths = 0;
  for (std::int64_t j = 0; j < head.classes(); ++j) {
    if (ray[j] == 0) continue;
    constraints.push_back(j);
    weights.push_back(ray[j]);
    add_product(value, margins[j], ray[j]);
    size += std::fabs(margins[j]) * ray[j];
    lengths += std::sqrt(squared_lengths[j]) * ray[j];
  }
  RayProof proof;
  proof.value = value.value();
  const double left = length_of_sum(head, k, constraints, weights);
  // Lengths that left the range of a double measure nothing, and neither do margins near its end.
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kSmallest = 1e-280;
  proof.dual = left == 0 ? 0 : lengths > 0 && lengths < kInfinity ? left / lengths : kInfinity;
  const double share = size > kSmallest ? proof.value / size : 0;
  proof.holds = share > kRayTolerance && proof.dual <= kRayTolerance * share;
  return proof;
}

}  // namespace tacext
