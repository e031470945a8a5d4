#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// The dual active-set method for one class k: minimise 1/2 |s|^2 subject to a_j . s >= m_j with
// a_j = w_k - w_j (Goldfarb and Idnani, Mathematical Programming 27, 1983, with identity Hessian).
//
// Two geometries carry it: PricedActiveSet from the Gram matrix, fast, and OrthogonalActiveSet from
// W itself, for what the certificate of the first one does not accept.
namespace tacext {

enum class Ending { kSolved, kUnreachable, kIterationLimit };

/// s = sum_i multipliers[i] * a_active[i], optimal for the active constraints alone, multipliers
/// >= 0. For Ending::kUnreachable the multipliers are a Farkas ray.
struct ActiveSet {
  std::vector<std::int64_t> active;
  std::vector<double> multipliers;
  std::int64_t iterations = 0;
};

namespace active_set {

constexpr std::int64_t kNone = -1;

struct Blocking {
  double step = std::numeric_limits<double>::infinity();
  std::int64_t index = kNone;
};

/// How far the multipliers can move along -coefficients before one of them reaches zero.
Blocking first_blocking(const std::vector<double>& multipliers,
                        const std::vector<double>& coefficients);

/// How far slack_j = m_j - a_j . s must be above zero for a constraint to count as violated, as a
/// share of what the rounding of slack_j is relative to.
constexpr double kViolated = 1e-13;

}  // namespace active_set

/// Makes the violated constraint p active, and every constraint inactive whose multiplier would
/// turn negative on the way. kSolved: p is active. The geometry provides
///
///   project(p, r)    splits a_p = sum_i r[i] a_active[i] + z, returns |z|^2
///   slack(p), squared_length(p)
///   advance(step)    s += step * z, with the z of the last project
///   append_projected()  extends its factor by the p of the last project
///   remove(index)
///   constraint(p)    the class j of its constraint p
template <class Geometry>
Ending satisfy(Geometry& geometry, std::int64_t p, std::int64_t max_iterations, ActiveSet& set) {
  std::vector<double>& multipliers = set.multipliers;
  std::vector<double> coefficients;
  double candidate_multiplier = 0;
  for (;;) {
    if (set.iterations == max_iterations) return Ending::kIterationLimit;
    ++set.iterations;
    const double curvature = geometry.project(p, coefficients);
    // Negated, so that the NaN of products that overflowed counts as dependent.
    const bool dependent = !(curvature > Geometry::kDependent * geometry.squared_length(p));
    const active_set::Blocking blocking = active_set::first_blocking(multipliers, coefficients);
    if (dependent && blocking.index == active_set::kNone) {
      // a_p = sum r_i a_i with all r_i <= 0: weighing the violated a_p with 1 and the active ones
      // with -r_i adds up to 0 >= something positive.
      for (std::size_t i = 0; i < multipliers.size(); ++i)
        multipliers[i] = std::max(0.0, -coefficients[i]);
      set.active.push_back(geometry.constraint(p));
      multipliers.push_back(1.0);
      return Ending::kUnreachable;
    }

    // Along z the candidate becomes active after a full step; a multiplier may hit zero before.
    const double full_step =
        dependent ? std::numeric_limits<double>::infinity() : geometry.slack(p) / curvature;
    const double step = std::min(full_step, blocking.step);
    // Overflowed: no step, and no constraint kNone to remove.
    if (!std::isfinite(step)) return Ending::kIterationLimit;
    for (std::size_t i = 0; i < multipliers.size(); ++i)
      multipliers[i] = std::max(0.0, multipliers[i] - step * coefficients[i]);
    candidate_multiplier += step;
    if (!dependent && step > 0) geometry.advance(step);

    if (full_step <= blocking.step) {
      geometry.append_projected();
      set.active.push_back(geometry.constraint(p));
      multipliers.push_back(candidate_multiplier);
      return Ending::kSolved;
    }
    // Dual feasibility would end here: the blocking constraint leaves the set.
    geometry.remove(blocking.index);
    set.active.erase(set.active.begin() + blocking.index);
    multipliers.erase(multipliers.begin() + blocking.index);
  }
}

}  // namespace tacext
