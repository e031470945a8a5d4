#include "certificate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "doubled.h"
#include "farkas_ray.h"

namespace tacext {
namespace {

// Noise that is a smaller share of a violation's measure than this hides no violation worth
// reporting.
constexpr double kNoisy = 1e-13;

// residual / size, infinite where a NaN or an overflow leaves nothing proven.
double share_of(double residual, double size) {
  if (residual == 0 && size == 0) return 0;
  const double share = residual / size;
  return share >= 0 && size < std::numeric_limits<double>::infinity()
             ? share
             : std::numeric_limits<double>::infinity();
}

/// A ray that proves too little is no answer at all.
void certify_ray(const HeadGeometry& head, std::int64_t k, const double* margins,
                 const std::vector<double>& squared_lengths, Candidate& candidate) {
  const RayProof proof =
      prove_unreachable(head, k, margins, squared_lengths, candidate.multipliers);
  if (proof.holds) {
    candidate.primal = 0;
    candidate.dual = proof.dual;
    candidate.gap = -proof.value;
    return;
  }
  candidate.status = Status::kIterationLimit;
  candidate.primal = candidate.dual = candidate.gap = std::numeric_limits<double>::infinity();
  std::fill(candidate.multipliers.begin(), candidate.multipliers.end(), 0.0);
  std::fill(candidate.perturbation.begin(), candidate.perturbation.end(), 0.0);
}

/// The active constraints of a candidate, last one first.
struct Active {
  std::vector<std::int64_t> constraints;
  std::vector<double> multipliers;

  Active(const Candidate& candidate, std::int64_t k) {
    for (auto j = static_cast<std::int64_t>(candidate.multipliers.size()) - 1; j >= 0; --j)
      if (j != k && candidate.multipliers[j] > 0) {
        constraints.push_back(j);
        multipliers.push_back(candidate.multipliers[j]);
      }
  }
};

/// 2 m.l - |sum_j l_j a_j|^2: whatever l >= 0, at most |s|^2 of every s that is feasible.
double bound_of(const Active& active, const double* margins, const std::vector<double>& sum) {
  Doubled value;  // m.l, which may cancel
  for (std::size_t i = 0; i < active.constraints.size(); ++i)
    add_product(value, margins[active.constraints[i]], active.multipliers[i]);
  return 2 * value.value() - dot(sum.data(), sum.data(), static_cast<std::int64_t>(sum.size()));
}

/// products[j] = a_j . s, sizes[j] is what a violation of constraint j is measured against beside
/// |M[k, j]|, sum = sum_j l_j a_j, and bound is at most the square of the optimal norm.
void judge(std::int64_t k, const double* margins, const std::vector<double>& squared_lengths,
           const std::vector<double>& products, const std::vector<double>& sizes,
           const Active& active, const std::vector<double>& sum, double bound, double tolerance,
           Candidate& candidate) {
  candidate.primal = 0;
  for (std::size_t j = 0; j < products.size(); ++j) {
    if (static_cast<std::int64_t>(j) == k) continue;
    const double violation = margins[j] - products[j];
    if (!(violation <= 0))
      candidate.primal =
          std::max(candidate.primal, share_of(violation, std::fabs(margins[j]) + sizes[j]));
  }
  const double length = norm(candidate.perturbation);
  double terms = length;  // |s| + sum_j l_j |a_j|
  for (std::size_t i = 0; i < active.constraints.size(); ++i)
    terms += active.multipliers[i] * std::sqrt(squared_lengths[active.constraints[i]]);
  std::vector<double> rest = candidate.perturbation;
  add_scaled(-1.0, sum.data(), static_cast<std::int64_t>(rest.size()), rest.data());
  candidate.dual = share_of(norm(rest), terms);
  candidate.collinearity = length > 0 ? terms / length : 1;
  const double energy = length * length;
  candidate.gap = share_of(std::fabs(energy - bound), std::max(energy, std::fabs(bound)));
  const bool proven = candidate.worst_residual() <= tolerance;
  candidate.status = proven ? Status::kOptimal : Status::kIterationLimit;
}

}  // namespace

double norm(const std::vector<double>& values) {
  return std::sqrt(dot(values.data(), values.data(), static_cast<std::int64_t>(values.size())));
}

std::vector<double> spread(const std::vector<std::int64_t>& active,
                           const std::vector<double>& values, std::int64_t classes) {
  std::vector<double> all(static_cast<std::size_t>(classes), 0.0);
  for (std::size_t i = 0; i < active.size(); ++i) all[active[i]] = values[i];
  return all;
}

void mark_unreachable(Candidate& candidate) {
  candidate.status = Status::kUnreachable;
  double sum = 0;
  for (double l : candidate.multipliers) sum += l;
  for (double& l : candidate.multipliers) l /= sum;
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

std::vector<Doubled> combine_constraints_doubled(const HeadGeometry& head, std::int64_t k,
                                                 const std::vector<std::int64_t>& constraints,
                                                 const std::vector<double>& multipliers) {
  std::vector<const double*> rows;
  for (std::int64_t j : constraints) rows.push_back(head.row(j));
  return weighted_differences_doubled(head.row(k), rows, multipliers.data(), head.latents());
}

void certify_doubled(const HeadGeometry& head, std::int64_t k, const double* margins,
                     const std::vector<double>& squared_lengths, double tolerance,
                     Candidate& candidate) {
  if (candidate.status == Status::kUnreachable)
    return certify_ray(head, k, margins, squared_lengths, candidate);
  const double* const s = candidate.perturbation.data();
  std::vector<double> products, sizes;
  for (std::int64_t j = 0; j < head.classes(); ++j) {
    products.push_back(head.constraint_dot_doubled(k, j, s).value());
    sizes.push_back(head.constraint_dot_size(k, j, s));
  }
  const Active active(candidate, k);
  Active exact = active;
  for (std::size_t i = 0; i < active.constraints.size() && !candidate.corrections.empty(); ++i) {
    exact.constraints.push_back(active.constraints[i]);
    exact.multipliers.push_back(candidate.corrections[active.constraints[i]]);
  }
  std::vector<double> exact_sum;
  for (const Doubled& entry :
       combine_constraints_doubled(head, k, exact.constraints, exact.multipliers))
    exact_sum.push_back(entry.value());
  judge(k, margins, squared_lengths, products, sizes, active,
        combine_constraints(head, k, active.constraints, active.multipliers),
        bound_of(exact, margins, exact_sum), tolerance, candidate);
}

void certify(const HeadGeometry& head, std::int64_t k, const double* margins,
             const std::vector<double>& squared_lengths, const double* row_products,
             double tolerance, Candidate& candidate) {
  if (candidate.status == Status::kUnreachable)
    return certify_ray(head, k, margins, squared_lengths, candidate);
  const double length = norm(candidate.perturbation);
  const auto classes = static_cast<std::size_t>(head.classes());
  std::vector<double> products(classes), sizes(classes);
  for (std::size_t j = 0; j < classes; ++j) {
    products[j] = row_products[k] - row_products[j];
    sizes[j] = std::sqrt(squared_lengths[j]) * length;
    const double noise = head.difference_noise(k, static_cast<std::int64_t>(j)) * length;
    if (noise > kNoisy * (std::fabs(margins[j]) + sizes[j]) && products[j] < margins[j] + noise)
      products[j] =
          head.constraint_dot(k, static_cast<std::int64_t>(j), candidate.perturbation.data());
  }
  const Active active(candidate, k);
  // Last constraint first: not the sum that s came from.
  const std::vector<double> sum =
      combine_constraints(head, k, active.constraints, active.multipliers);
  judge(k, margins, squared_lengths, products, sizes, active, sum, bound_of(active, margins, sum),
        tolerance, candidate);
}

}  // namespace tacext
