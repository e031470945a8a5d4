#include "certificate.h"

#include <cmath>
#include <limits>

namespace tacext {
namespace {

// A ray counts as a proof only when it cancels to rounding: a head that merely comes close to
// unreachable has a huge perturbation, and that is its answer.
constexpr double kRayTolerance = 1e-12;

void certify_ray(const HeadGeometry& head, std::int64_t k, const double* margins,
                 Candidate& candidate) {
  const std::vector<double> squared_norms = head.squared_norms(k);
  double value = 0, size = 0, length = 0;
  for (std::int64_t j = 0; j < head.classes(); ++j) {
    const double l = candidate.multipliers[j];
    if (l == 0) continue;
    value += margins[j] * l;
    size += std::fabs(margins[j]) * l;
    length += std::sqrt(squared_norms[j]) * l;
  }
  candidate.primal = 0;
  candidate.dual = length > 0 ? norm(candidate.perturbation) / length : 0;
  candidate.gap = -value;
  if (candidate.dual <= kRayTolerance && value > kRayTolerance * size) return;
  candidate.status = Status::kIterationLimit;
  candidate.primal = std::numeric_limits<double>::infinity();
}

}  // namespace

double norm(const std::vector<double>& values) {
  return std::sqrt(dot(values.data(), values.data(), static_cast<std::int64_t>(values.size())));
}

std::vector<double> combine_constraints(const HeadGeometry& head, std::int64_t k,
                                        const std::vector<double>& multipliers) {
  std::vector<double> s(static_cast<std::size_t>(head.latents()), 0.0);
  for (std::int64_t j = 0; j < head.classes(); ++j) {
    if (multipliers[j] == 0) continue;
    for (std::int64_t d = 0; d < head.latents(); ++d)
      s[d] += multipliers[j] * (head.row(k)[d] - head.row(j)[d]);
  }
  return s;
}

void certify(const HeadGeometry& head, std::int64_t k, const double* margins,
             const double* products, double tolerance, Candidate& candidate) {
  if (candidate.status == Status::kUnreachable) return certify_ray(head, k, margins, candidate);
  const std::vector<double> squared_norms = head.squared_norms(k);
  const double length = norm(candidate.perturbation);
  double value = 0;                                   // m.l
  double terms = length;                              // |s| + sum_j l_j |a_j|
  std::vector<double> rest = candidate.perturbation;  // s - sum_j l_j a_j, last constraint first
  candidate.primal = 0;
  for (std::int64_t j = head.classes() - 1; j >= 0; --j) {
    if (j == k) continue;
    const double l = candidate.multipliers[j], constraint_length = std::sqrt(squared_norms[j]);
    value += margins[j] * l;
    terms += l * constraint_length;
    if (l > 0)
      for (std::int64_t d = 0; d < head.latents(); ++d)
        rest[d] -= l * (head.row(k)[d] - head.row(j)[d]);
    const double violation = margins[j] - products[j];
    if (violation > 0)
      candidate.primal = std::max(candidate.primal,
                                  violation / (std::fabs(margins[j]) + constraint_length * length));
  }
  candidate.dual = terms > 0 ? norm(rest) / terms : 0;
  const double energy = length * length, size = std::max(energy, std::fabs(value));
  candidate.gap = size > 0 ? std::fabs(energy - value) / size : 0;
  const bool proven = candidate.worst_residual() <= tolerance;
  candidate.status = proven ? Status::kOptimal : Status::kIterationLimit;
}

void certify(const HeadGeometry& head, const std::vector<std::int64_t>& classes,
             const double* margins, double tolerance, std::vector<Candidate>& candidates) {
  const std::int64_t count = static_cast<std::int64_t>(candidates.size());
  std::vector<double> rows(static_cast<std::size_t>(count * head.latents()));
  for (std::int64_t i = 0; i < count; ++i)
    std::copy(candidates[i].perturbation.begin(), candidates[i].perturbation.end(),
              rows.begin() + i * head.latents());
  std::vector<double> products(static_cast<std::size_t>(count * head.classes()));
  head.packed().multiply(rows.data(), count, head.classes(), products.data(), head.classes());
  for (std::int64_t i = 0; i < count; ++i) {
    double* const row = products.data() + i * head.classes();
    const double own = row[classes[i]];
    for (std::int64_t j = 0; j < head.classes(); ++j) row[j] = own - row[j];
    certify(head, classes[i], margins + classes[i] * head.classes(), row, tolerance, candidates[i]);
  }
}

}  // namespace tacext
