#include "certificate.h"

#include <cmath>
#include <limits>

namespace tacext {
namespace {

// A ray counts as a proof only when it cancels to rounding: a head that merely comes close to
// unreachable has a huge perturbation, and that is its answer.
constexpr double kRayTolerance = 1e-13;

// residual / size, infinite where a NaN or an overflow leaves nothing proven.
double share_of(double residual, double size) {
  if (residual == 0 && size == 0) return 0;
  const double share = residual / size;
  return share >= 0 && size < std::numeric_limits<double>::infinity()
             ? share
             : std::numeric_limits<double>::infinity();
}

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
             const double* products, const double* sizes, double tolerance, Candidate& candidate) {
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
    if (!(violation <= 0))
      candidate.primal =
          std::max(candidate.primal, share_of(violation, std::fabs(margins[j]) + sizes[j]));
  }
  candidate.dual = share_of(norm(rest), terms);
  candidate.collinearity = length > 0 ? terms / length : 1;
  const double energy = length * length, size = std::max(energy, std::fabs(value));
  candidate.gap = share_of(std::fabs(energy - value), size);
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
    const double length = norm(candidates[i].perturbation);
    std::vector<double> sizes = head.squared_norms(classes[i]);
    for (std::int64_t j = 0; j < head.classes(); ++j) {
      row[j] = own - row[j];
      sizes[j] = std::sqrt(sizes[j]) * length;
    }
    certify(head, classes[i], margins + classes[i] * head.classes(), row, sizes.data(), tolerance,
            candidates[i]);
  }
}

}  // namespace tacext
