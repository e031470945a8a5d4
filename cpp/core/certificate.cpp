#include "certificate.h"

#include <cmath>
#include <limits>

namespace tacext {
namespace {

// A ray counts as a proof only when it cancels to rounding: a head that merely comes close to
// unreachable has a huge perturbation, and that is its answer.
constexpr double kRayTolerance = 1e-13;

// Residuals below this need no digits.
constexpr double kNoisy = 1e-13;

// residual / size, infinite where a NaN or an overflow leaves nothing proven.
double share_of(double residual, double size) {
  if (residual == 0 && size == 0) return 0;
  const double share = residual / size;
  return share >= 0 && size < std::numeric_limits<double>::infinity()
             ? share
             : std::numeric_limits<double>::infinity();
}

void certify_ray(const HeadGeometry& head, std::int64_t k, const double* margins,
                 const std::vector<double>& squared_lengths, Candidate& candidate) {
  double value = 0, size = 0, length = 0;
  for (std::int64_t j = 0; j < head.classes(); ++j) {
    const double l = candidate.multipliers[j];
    if (l == 0) continue;
    value += margins[j] * l;
    size += std::fabs(margins[j]) * l;
    length += std::sqrt(squared_lengths[j]) * l;
  }
  candidate.primal = 0;
  candidate.dual = length > 0 ? norm(candidate.perturbation) / length : 0;
  candidate.gap = -value;
  // Length 0 must come from equal rows; differences that merely underflow prove nothing.
  for (std::int64_t j = 0; j < head.classes() && length == 0; ++j)
    if (candidate.multipliers[j] > 0 &&
        !std::equal(head.row(k), head.row(k) + head.latents(), head.row(j)))
      candidate.dual = std::numeric_limits<double>::infinity();
  if (candidate.dual <= kRayTolerance && value > kRayTolerance * size) return;
  candidate.status = Status::kIterationLimit;
  candidate.primal = std::numeric_limits<double>::infinity();
}

}  // namespace

double norm(const std::vector<double>& values) {
  return std::sqrt(dot(values.data(), values.data(), static_cast<std::int64_t>(values.size())));
}

std::vector<double> combine_constraints(const HeadGeometry& head, std::int64_t k,
                                        const std::vector<std::int64_t>& constraints,
                                        const std::vector<double>& multipliers) {
  std::vector<const double*> rows;
  for (std::int64_t j : constraints) rows.push_back(head.row(j));
  std::vector<double> s(static_cast<std::size_t>(head.latents()));
  weighted_differences(head.row(k), rows, multipliers.data(), head.latents(), s.data());
  return s;
}

void certify(const HeadGeometry& head, std::int64_t k, const double* margins,
             const std::vector<double>& squared_lengths, const double* products,
             const double* sizes, double tolerance, Candidate& candidate) {
  if (candidate.status == Status::kUnreachable)
    return certify_ray(head, k, margins, squared_lengths, candidate);
  const double length = norm(candidate.perturbation);
  double value = 0;       // m.l
  double terms = length;  // |s| + sum_j l_j |a_j|
  std::vector<std::int64_t> constraints;
  std::vector<double> multipliers;
  candidate.primal = 0;
  for (std::int64_t j = head.classes() - 1; j >= 0; --j) {
    if (j == k) continue;
    if (const double l = candidate.multipliers[j]; l > 0) {
      value += margins[j] * l;
      terms += l * std::sqrt(squared_lengths[j]);
      constraints.push_back(j);
      multipliers.push_back(l);
    }
    const double violation = margins[j] - products[j];
    if (!(violation <= 0))
      candidate.primal =
          std::max(candidate.primal, share_of(violation, std::fabs(margins[j]) + sizes[j]));
  }
  // s - sum_j l_j a_j, last constraint first: not the sum that s came from.
  std::vector<double> rest = combine_constraints(head, k, constraints, multipliers);
  for (std::size_t d = 0; d < rest.size(); ++d) rest[d] = candidate.perturbation[d] - rest[d];
  candidate.dual = share_of(norm(rest), terms);
  candidate.collinearity = length > 0 ? terms / length : 1;
  const double energy = length * length, size = std::max(energy, std::fabs(value));
  candidate.gap = share_of(std::fabs(energy - value), size);
  const bool proven = candidate.worst_residual() <= tolerance;
  candidate.status = proven ? Status::kOptimal : Status::kIterationLimit;
}

void certify(const HeadGeometry& head, std::int64_t k, const double* margins,
             const std::vector<double>& squared_lengths, const double* row_products,
             double tolerance, Candidate& candidate) {
  const double length = norm(candidate.perturbation);
  const auto classes = static_cast<std::size_t>(head.classes());
  std::vector<double> products(classes), sizes(classes), noise(classes);
  for (std::size_t j = 0; j < classes; ++j) {
    products[j] = row_products[k] - row_products[j];
    sizes[j] = std::sqrt(squared_lengths[j]) * length;
    noise[j] = head.difference_noise(k, static_cast<std::int64_t>(j)) * length;
  }
  for (std::size_t j = 0; j < classes; ++j)
    if (noise[j] > kNoisy * (std::fabs(margins[j]) + sizes[j]) &&
        products[j] < margins[j] + noise[j])
      products[j] =
          head.constraint_dot(k, static_cast<std::int64_t>(j), candidate.perturbation.data());
  certify(head, k, margins, squared_lengths, products.data(), sizes.data(), tolerance, candidate);
}

}  // namespace tacext
