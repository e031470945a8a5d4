#include "orthogonal_active_set.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace tacext {

OrthogonalActiveSet::OrthogonalActiveSet(const HeadGeometry& head, std::int64_t target,
                                         const double* margins,
                                         const std::vector<double>& squared_lengths)
    : head_(head),
      target_(target),
      margins_(margins),
      squared_lengths_(squared_lengths),
      slack_(margins, margins + head.classes()),  // at s = 0
      rounding_(slack_.size()),
      s_(static_cast<std::size_t>(head.latents()), 0.0) {}

Ending OrthogonalActiveSet::solve(std::int64_t max_iterations) {
  for (;;) {
    renew_slack();
    const std::int64_t p = most_violated();
    // None: primal feasible, and dual feasible and complementary all along. KKT holds.
    if (p == active_set::kNone) return Ending::kSolved;
    if (squared_lengths_[p] == 0) {  // 0 . s >= m with m > 0
      set_.active = {p};
      set_.multipliers = {1.0};
      return Ending::kUnreachable;
    }
    const Ending ending = satisfy(*this, p, max_iterations, set_);
    if (ending != Ending::kSolved) return ending;
  }
}

/// Puts s back on the active constraints, and slack_j = m_j - a_j . s afresh. Its rounding is
/// relative to |m_j| + sum_d |a_jd s_d|: where a huge s meets small entries of a_j, |a_j| |s| says
/// too little. Doubled precision where the rounding of plain sums would decide.
void OrthogonalActiveSet::renew_slack() {
  constexpr double kPlain = 1e-9;  // share of its measure from which a plain sum is good enough
  std::vector<double> residual;
  for (std::int64_t j : set_.active)
    residual.push_back(
        remainder_of(margins_[j], head_.constraint_dot_doubled(target_, j, s_.data())));
  add_step(std::move(residual), s_);
  for (std::int64_t j = 0; j < head_.classes(); ++j) {
    slack_[j] = margins_[j] - head_.constraint_dot(target_, j, s_.data());
    rounding_[j] = std::fabs(margins_[j]) + head_.constraint_dot_size(target_, j, s_.data());
    if (std::fabs(slack_[j]) <= kPlain * rounding_[j])
      slack_[j] = remainder_of(margins_[j], head_.constraint_dot_doubled(target_, j, s_.data()));
  }
  for (std::int64_t j : set_.active) slack_[j] = 0;  // complementary slackness, free of rounding
}

/// The constraint furthest (in distance) from holding; one that cannot hold goes first.
std::int64_t OrthogonalActiveSet::most_violated() const {
  std::int64_t worst = active_set::kNone;
  double furthest = 0;
  for (std::int64_t j = 0; j < head_.classes(); ++j) {
    if (j == target_ || slack_[j] <= 0) continue;
    if (squared_lengths_[j] == 0) {
      if (margins_[j] > 0) return j;
      continue;
    }
    const double distance = slack_[j] / std::sqrt(squared_lengths_[j]);
    if (slack_[j] > kViolated * rounding_[j] && distance > furthest) {
      furthest = distance;
      worst = j;
    }
  }
  return worst;
}

double OrthogonalActiveSet::project(std::int64_t p, std::vector<double>& coefficients) {
  const std::int64_t latents = head_.latents();
  candidate_ = p;
  orthogonal_.resize(static_cast<std::size_t>(latents));
  for (std::int64_t d = 0; d < latents; ++d)
    orthogonal_[d] = head_.row(target_)[d] - head_.row(p)[d];
  projection_.assign(basis_.size(), 0.0);
  for (int pass = 0; pass < 2; ++pass)  // twice is enough to be orthogonal to rounding
    for (std::size_t i = 0; i < basis_.size(); ++i) {
      const double along = dot(basis_[i].data(), orthogonal_.data(), latents);
      projection_[i] += along;
      add_scaled(-along, basis_[i].data(), latents, orthogonal_.data());
    }
  residual_ = dot(orthogonal_.data(), orthogonal_.data(), latents);
  coefficients = projection_;
  factor_.solve_upper(coefficients.data());
  return residual_;
}

void OrthogonalActiveSet::advance(double step) {
  for (std::int64_t j = 0; j < head_.classes(); ++j)
    slack_[j] -= step * head_.constraint_dot(target_, j, orthogonal_.data());
  add_scaled(step, orthogonal_.data(), head_.latents(), s_.data());
}

void OrthogonalActiveSet::append_projected() {
  const double length = std::sqrt(residual_);
  factor_.append(projection_.data(), length);
  for (double& value : orthogonal_) value /= length;
  basis_.push_back(orthogonal_);
}

void OrthogonalActiveSet::remove(std::int64_t index) {
  factor_.remove(index, [this](std::int64_t i, double cosine, double sine) {
    for (std::size_t d = 0; d < basis_[i].size(); ++d) {
      const double left = basis_[i][d], right = basis_[i + 1][d];
      basis_[i][d] = cosine * left + sine * right;
      basis_[i + 1][d] = cosine * right - sine * left;
    }
  });
  basis_.pop_back();
}

std::vector<double> OrthogonalActiveSet::multipliers_of(const std::vector<double>& s) const {
  std::vector<double> multipliers;
  for (const std::vector<double>& direction : basis_)
    multipliers.push_back(dot(direction.data(), s.data(), head_.latents()));
  factor_.solve_upper(multipliers.data());
  return multipliers;
}

void OrthogonalActiveSet::add_step(std::vector<double> residual, std::vector<double>& s) const {
  factor_.solve_lower(residual.data());
  for (std::size_t i = 0; i < basis_.size(); ++i)
    add_scaled(residual[i], basis_[i].data(), head_.latents(), s.data());
}

}  // namespace tacext
