#pragma once

#include <cstdint>
#include <vector>

#include "cholesky.h"
#include "head_geometry.h"

// The dual active-set method for one class k: minimise 1/2 |s|^2 subject to a_j . s >= m_j with
// a_j = w_k - w_j (Goldfarb and Idnani, Mathematical Programming 27, 1983, with identity Hessian).
namespace tacext {

enum class Ending { kSolved, kUnreachable, kIterationLimit };

/// s = sum_i multipliers[i] * a_active[i]; for kUnreachable the multipliers are a Farkas ray.
struct ActiveSetSolution {
  Ending ending = Ending::kIterationLimit;
  std::vector<std::int64_t> active;
  std::vector<double> multipliers;
  std::int64_t iterations = 0;
};

/// The geometry of the active constraints from K alone: G = A A^T factored as L L^T.
class GramFactor {
 public:
  /// |a_p - projection|^2 below this share of |a_p|^2 counts as linearly dependent. Generous, as K
  /// squares the condition number: what it decides is checked against W afterwards.
  static constexpr double kDependent = 1e-12;

  GramFactor(const HeadGeometry& head, std::int64_t target);

  /// Splits a_p = sum_i coefficients[i] a_active[i] + z and returns |z|^2.
  double project(std::int64_t p, double squared_norm, std::vector<double>& coefficients);
  /// a_j . z for every j, with the z of the last project().
  const double* slack_rates();
  /// s += step * z
  void advance(double /*step*/) {}
  /// Nothing: the slacks that the steps left are as good as K gets.
  void renew_slack(const double* /*margins*/, std::vector<double>& /*slack*/,
                   std::vector<double>& /*rounding*/) {}
  void add_projected();
  void remove(std::int64_t index);
  /// x = (A A^T)^-1 x over the active constraints.
  void solve(std::vector<double>& x) const;

 private:
  const HeadGeometry& head_;
  std::int64_t target_, candidate_ = -1;
  double residual_ = 0;
  std::vector<std::int64_t> active_;
  std::vector<double> projection_, coefficients_, rates_;
  PackedCholesky factor_;
};

/// The same from W itself: an orthonormal basis of the active constraints, A = L Q. Slower by a
/// factor of D, accurate where K is not: the fallback for what the certificate rejects.
class OrthogonalFactor {
 public:
  static constexpr double kDependent = 1e-28;

  OrthogonalFactor(const HeadGeometry& head, std::int64_t target);

  double project(std::int64_t p, double squared_norm, std::vector<double>& coefficients);
  const double* slack_rates();
  void advance(double step);
  /// Puts s back on the active constraints, and slack_j = m_j - a_j . s afresh. rounding_j becomes
  /// |m_j| + sum_d |a_jd s_d|: where a huge s meets small entries of a_j, |a_j| |s| says too
  /// little.
  void renew_slack(const double* margins, std::vector<double>& slack,
                   std::vector<double>& rounding);
  void add_projected();
  void remove(std::int64_t index);
  void solve(std::vector<double>& x) const;
  /// s += the shortest step along which the active products A s grow by `residual`: Q^T L^-1 r. It
  /// never sums l_j a_j, which cancels where the active constraints are nearly dependent.
  void add_step(std::vector<double> residual, std::vector<double>& s) const;

 private:
  const HeadGeometry& head_;
  std::int64_t target_;
  std::int64_t candidate_ = -1;
  double residual_ = 0;
  std::vector<std::int64_t> active_;
  std::vector<double> projection_, orthogonal_, rates_, s_;
  std::vector<std::vector<double>> basis_;
  PackedCholesky factor_;
};

/// Runs the method from the empty set; leaves `factor` holding the final active constraints.
/// margins and squared_norms are row k, [classes].
template <class Factor>
ActiveSetSolution solve_active_set(Factor& factor, const double* margins,
                                   const std::vector<double>& squared_norms, std::int64_t target,
                                   std::int64_t max_iterations);

}  // namespace tacext
