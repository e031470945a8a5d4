#pragma once

#include <cstdint>
#include <vector>

#include "active_set.h"
#include "cholesky.h"
#include "head_geometry.h"

namespace tacext {

/// The active-set method from W itself: an orthonormal basis of the active constraints, A = L Q.
/// Slower than from K by a factor of D, and accurate where K, which squares the condition number,
/// is not: the fallback for what the certificate rejects.
class OrthogonalActiveSet {
 public:
  static constexpr double kDependent = 1e-28;
  /// As active_set::kViolated, for slack in doubled precision: a few roundings of s itself. What
  /// lies below may still shorten an s whose terms exceed it by far.
  static constexpr double kViolated = 4e-16;

  /// margins and squared_lengths (|a_j|^2) are row `target` of theirs, [classes].
  OrthogonalActiveSet(const HeadGeometry& head, std::int64_t target, const double* margins,
                      const std::vector<double>& squared_lengths);

  Ending solve(std::int64_t max_iterations);

  const ActiveSet& set() const { return set_; }
  std::int64_t target() const { return target_; }

  /// The l over the active constraints whose sum_i l_i a_i is nearest to s: L^-T Q s.
  std::vector<double> multipliers_of(const std::vector<double>& s) const;
  /// s += the shortest step along which the active products A s grow by `residual`: Q^T L^-1 r. It
  /// never sums l_j a_j, which cancels where the active constraints are nearly dependent.
  void add_step(std::vector<double> residual, std::vector<double>& s) const;

  // ---- what satisfy asks for ----
  double project(std::int64_t p, std::vector<double>& coefficients);
  double slack(std::int64_t p) const { return slack_[p]; }
  double squared_length(std::int64_t p) const { return squared_lengths_[p]; }
  std::int64_t constraint(std::int64_t p) const { return p; }
  void advance(double step);
  void append_projected();
  void remove(std::int64_t index);

 private:
  void renew_slack();
  std::int64_t most_violated() const;

  const HeadGeometry& head_;
  std::int64_t target_;
  const double* margins_;
  const std::vector<double>& squared_lengths_;
  ActiveSet set_;
  std::vector<double> slack_, rounding_;  // slack_j = m_j - a_j.s, and what its rounding is to
  std::int64_t candidate_ = -1;
  double residual_ = 0;
  std::vector<double> projection_, orthogonal_, s_;
  std::vector<std::vector<double>> basis_;
  PackedCholesky factor_;
};

}  // namespace tacext
