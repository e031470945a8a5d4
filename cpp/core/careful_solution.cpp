#include "careful_solution.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "doubled.h"
#include "orthogonal_active_set.h"

namespace tacext {
namespace {

constexpr int kRounds = 5;  // of refinement, at most

/// The s at which the active constraints hold, refined until their residuals stay at the rounding
/// of s itself.
void refine_perturbation(const HeadGeometry& head, const OrthogonalActiveSet& method,
                         const double* margins, std::vector<double>& s) {
  const std::vector<std::int64_t>& active = method.set().active;
  std::fill(s.begin(), s.end(), 0.0);
  double before = std::numeric_limits<double>::infinity();
  for (int round = 0; round < kRounds; ++round) {
    std::vector<double> residual;
    double worst = 0;
    for (const std::int64_t j : active) {
      residual.push_back(
          remainder_of(margins[j], head.constraint_dot_doubled(method.target(), j, s.data())));
      worst = std::max(worst, std::fabs(residual.back()));
    }
    if (worst == 0 || !(worst <= 0.5 * before)) return;
    before = worst;
    method.add_step(std::move(residual), s);
  }
}

struct RefinedMultipliers {
  std::vector<double> rounded, corrections;  // over the active constraints
};

/// The multipliers that make s, refined against s - sum_j l_j a_j: where the a_j nearly cancel,
/// l = (A A^T)^-1 m alone would be off by the square of their condition, and by more than counts
/// even when rounded to doubles.
RefinedMultipliers refined_multipliers(const HeadGeometry& head, const OrthogonalActiveSet& method,
                                       const std::vector<double>& s) {
  std::vector<std::int64_t> twice = method.set().active;
  const std::size_t count = twice.size();
  twice.insert(twice.end(), method.set().active.begin(), method.set().active.end());
  std::vector<double> parts(2 * count, 0.0);  // the doubles, then their corrections
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<Doubled> sum =
        combine_constraints_doubled(head, method.target(), twice, parts);
    std::vector<double> rest(s.size());
    for (std::size_t d = 0; d < s.size(); ++d) rest[d] = remainder_of(s[d], sum[d]);
    const std::vector<double> step = method.multipliers_of(rest);
    for (std::size_t i = 0; i < count; ++i) {
      const Doubled moved = two_sum(parts[i], parts[count + i] + step[i]);
      const bool positive = moved.high > 0;
      parts[i] = positive ? moved.high : 0;
      parts[count + i] = positive ? moved.low : 0;
    }
  }
  return {{parts.begin(), parts.begin() + static_cast<std::ptrdiff_t>(count)},
          {parts.begin() + static_cast<std::ptrdiff_t>(count), parts.end()}};
}

}  // namespace

Candidate solve_carefully(const HeadGeometry& head, std::int64_t k, const double* margins,
                          const std::vector<double>& squared_lengths, double tolerance,
                          std::int64_t max_iterations) {
  OrthogonalActiveSet method(head, k, margins, squared_lengths);
  const Ending ending = method.solve(max_iterations);
  const ActiveSet& set = method.set();
  Candidate candidate;
  candidate.iterations = set.iterations;
  candidate.perturbation = combine_constraints(head, k, set.active, set.multipliers);
  candidate.multipliers = spread(set.active, set.multipliers, head.classes());
  if (ending == Ending::kSolved) {
    refine_perturbation(head, method, margins, candidate.perturbation);
    const RefinedMultipliers refined = refined_multipliers(head, method, candidate.perturbation);
    candidate.multipliers = spread(set.active, refined.rounded, head.classes());
    candidate.corrections = spread(set.active, refined.corrections, head.classes());
  }
  if (ending == Ending::kUnreachable) mark_unreachable(candidate);
  certify_doubled(head, k, margins, squared_lengths, tolerance, candidate);
  return candidate;
}

}  // namespace tacext
