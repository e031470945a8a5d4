#include "active_set.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tacext {

// ---- the method ---------------------------------------------------------------------------------

namespace {

constexpr std::int64_t kNone = -1;

struct Violation {
  std::int64_t constraint = kNone;
  bool impossible = false;  // 0 . s >= m with m > 0
};

// The constraint furthest (in distance) from holding; none where all hold to rounding.
Violation most_violated(const std::vector<double>& slack, const std::vector<double>& rounding,
                        const double* margins, const std::vector<double>& squared_norms,
                        std::int64_t target) {
  constexpr double kRounding = 1e-13;
  Violation worst;
  double furthest = 0;
  for (std::int64_t j = 0; j < static_cast<std::int64_t>(slack.size()); ++j) {
    if (j == target || slack[j] <= 0) continue;
    if (squared_norms[j] == 0) {
      if (margins[j] > 0) return {j, true};
      continue;
    }
    const double distance = slack[j] / std::sqrt(squared_norms[j]);
    if (slack[j] > kRounding * rounding[j] && distance > furthest) {
      furthest = distance;
      worst.constraint = j;
    }
  }
  return worst;
}

struct Blocking {
  double step = std::numeric_limits<double>::infinity();
  std::int64_t index = kNone;
};

// How far the multipliers can move along -coefficients before one of them reaches zero.
Blocking first_blocking(const std::vector<double>& multipliers,
                        const std::vector<double>& coefficients) {
  constexpr double kRounding = 1e-12;
  double largest = 0;
  for (double c : coefficients) largest = std::max(largest, std::fabs(c));
  Blocking blocking;
  for (std::size_t i = 0; i < multipliers.size(); ++i) {
    if (coefficients[i] <= kRounding * largest) continue;
    const double step = multipliers[i] / coefficients[i];
    if (step < blocking.step) blocking = {step, static_cast<std::int64_t>(i)};
  }
  return blocking;
}

double squared_norm_of_solution(const ActiveSetSolution& solution, const double* margins) {
  double sum = 0;  // s.s = l.G l = l.m on the active set
  for (std::size_t i = 0; i < solution.active.size(); ++i)
    sum += solution.multipliers[i] * margins[solution.active[i]];
  return std::max(sum, 0.0);
}

}  // namespace

template <class Factor>
ActiveSetSolution solve_active_set(Factor& factor, const double* margins,
                                   const std::vector<double>& squared_norms, std::int64_t target,
                                   std::int64_t max_iterations) {
  ActiveSetSolution solution;
  std::vector<std::int64_t>& active = solution.active;
  std::vector<double>& multipliers = solution.multipliers;
  std::vector<double> coefficients;
  // slack_j = m_j - a_j.s: positive where primal feasibility is violated. At s = 0 it is m.
  std::vector<double> slack(margins, margins + squared_norms.size());
  std::vector<double> rounding(slack.size());  // what the rounding of slack_j is relative to

  for (;;) {
    const double norm = std::sqrt(squared_norm_of_solution(solution, margins));
    for (std::size_t j = 0; j < slack.size(); ++j)
      rounding[j] = std::fabs(margins[j]) + std::sqrt(squared_norms[j]) * norm;
    factor.renew_slack(margins, slack, rounding);
    for (std::int64_t j : active) slack[j] = 0;  // complementary slackness, free of rounding
    const Violation violation = most_violated(slack, rounding, margins, squared_norms, target);
    const std::int64_t p = violation.constraint;
    if (p == kNone) {  // primal feasible; dual feasible and complementary all along: KKT holds
      solution.ending = Ending::kSolved;
      return solution;
    }
    if (violation.impossible) {
      active = {p};
      multipliers = {1.0};
      solution.ending = Ending::kUnreachable;
      return solution;
    }

    double candidate_multiplier = 0;
    for (bool added = false; !added;) {
      if (solution.iterations == max_iterations) {
        solution.ending = Ending::kIterationLimit;
        return solution;
      }
      ++solution.iterations;
      const double curvature = factor.project(p, squared_norms[p], coefficients);
      const bool dependent = curvature <= Factor::kDependent * squared_norms[p];
      const Blocking blocking = first_blocking(multipliers, coefficients);
      if (dependent && blocking.index == kNone) {
        // a_p = sum r_i a_i with all r_i <= 0: weighing the violated a_p with 1 and the active ones
        // with -r_i adds up to 0 >= something positive.
        for (std::size_t i = 0; i < active.size(); ++i)
          multipliers[i] = std::max(0.0, -coefficients[i]);
        active.push_back(p);
        multipliers.push_back(1.0);
        solution.ending = Ending::kUnreachable;
        return solution;
      }

      // Along z the candidate becomes active after a full step; a multiplier may hit zero before.
      const double full_step =
          dependent ? std::numeric_limits<double>::infinity() : slack[p] / curvature;
      const double step = std::min(full_step, blocking.step);
      for (std::size_t i = 0; i < multipliers.size(); ++i)
        multipliers[i] = std::max(0.0, multipliers[i] - step * coefficients[i]);
      candidate_multiplier += step;
      if (!dependent && step > 0) {
        const double* rates = factor.slack_rates();
        for (std::size_t j = 0; j < slack.size(); ++j) slack[j] -= step * rates[j];
        factor.advance(step);
      }

      if (full_step <= blocking.step) {
        factor.add_projected();
        active.push_back(p);
        multipliers.push_back(candidate_multiplier);
        added = true;
      } else {  // dual feasibility would end here: the blocking constraint leaves the set
        factor.remove(blocking.index);
        active.erase(active.begin() + blocking.index);
        multipliers.erase(multipliers.begin() + blocking.index);
      }
    }
  }
}

template ActiveSetSolution solve_active_set(GramFactor&, const double*, const std::vector<double>&,
                                            std::int64_t, std::int64_t);
template ActiveSetSolution solve_active_set(OrthogonalFactor&, const double*,
                                            const std::vector<double>&, std::int64_t, std::int64_t);

// ---- geometry from K ----------------------------------------------------------------------------

GramFactor::GramFactor(const HeadGeometry& head, std::int64_t target)
    : head_(head), target_(target), rates_(static_cast<std::size_t>(head.classes())) {}

double GramFactor::project(std::int64_t p, double squared_norm, std::vector<double>& coefficients) {
  const double* const k_row = head_.gram_row(target_);
  const double* const p_row = head_.gram_row(p);
  projection_.clear();
  for (std::int64_t j : active_)  // G[j, p] = K[k,k] - K[k,j] - K[k,p] + K[j,p]
    projection_.push_back((k_row[target_] - k_row[j]) - (k_row[p] - p_row[j]));
  factor_.solve_lower(projection_.data());
  residual_ = squared_norm - dot(projection_.data(), projection_.data(),
                                 static_cast<std::int64_t>(active_.size()));
  coefficients = projection_;
  factor_.solve_upper(coefficients.data());
  candidate_ = p;
  coefficients_ = coefficients;
  return residual_;
}

const double* GramFactor::slack_rates() {
  // z = a_p - sum r_i a_i = R w_k - w_p + sum r_i w_i with R = 1 - sum r_i, so h = W z is a
  // combination of rows of K, and a_j . z = h_k - h_j.
  std::fill(rates_.begin(), rates_.end(), 0.0);
  double total = 1;
  for (std::size_t i = 0; i < active_.size(); ++i) {
    total -= coefficients_[i];
    add_scaled(-coefficients_[i], head_.gram_row(active_[i]), head_.classes(), rates_.data());
  }
  add_scaled(1.0, head_.gram_row(candidate_), head_.classes(), rates_.data());
  add_scaled(-total, head_.gram_row(target_), head_.classes(), rates_.data());
  const double at_target = rates_[target_];  // rates_ holds -h
  for (double& rate : rates_) rate -= at_target;
  return rates_.data();
}

void GramFactor::add_projected() {
  factor_.append(projection_.data(), std::sqrt(residual_));
  active_.push_back(candidate_);
}

void GramFactor::remove(std::int64_t index) {
  factor_.remove(index, [](std::int64_t, double, double) {});
  active_.erase(active_.begin() + index);
}

void GramFactor::solve(std::vector<double>& x) const {
  factor_.solve_lower(x.data());
  factor_.solve_upper(x.data());
}

// ---- geometry from W ----------------------------------------------------------------------------

OrthogonalFactor::OrthogonalFactor(const HeadGeometry& head, std::int64_t target)
    : head_(head),
      target_(target),
      rates_(static_cast<std::size_t>(head.classes())),
      s_(static_cast<std::size_t>(head.latents()), 0.0) {}

double OrthogonalFactor::project(std::int64_t p, double /*squared_norm*/,
                                 std::vector<double>& coefficients) {
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

const double* OrthogonalFactor::slack_rates() {
  for (std::int64_t j = 0; j < head_.classes(); ++j)
    rates_[j] = head_.constraint_dot(target_, j, orthogonal_.data());
  return rates_.data();
}

void OrthogonalFactor::advance(double step) {
  add_scaled(step, orthogonal_.data(), head_.latents(), s_.data());
}

void OrthogonalFactor::renew_slack(const double* margins, std::vector<double>& slack,
                                   std::vector<double>& rounding) {
  std::vector<double> residual;
  for (std::int64_t j : active_)
    residual.push_back(margins[j] - head_.constraint_dot(target_, j, s_.data()));
  add_step(std::move(residual), s_);
  for (std::int64_t j = 0; j < head_.classes(); ++j) {
    slack[j] = margins[j] - head_.constraint_dot(target_, j, s_.data());
    rounding[j] = std::fabs(margins[j]) + head_.constraint_dot_size(target_, j, s_.data());
  }
}

void OrthogonalFactor::add_projected() {
  active_.push_back(candidate_);
  const double length = std::sqrt(residual_);
  factor_.append(projection_.data(), length);
  for (double& value : orthogonal_) value /= length;
  basis_.push_back(orthogonal_);
}

void OrthogonalFactor::remove(std::int64_t index) {
  active_.erase(active_.begin() + index);
  factor_.remove(index, [this](std::int64_t i, double cosine, double sine) {
    for (std::size_t d = 0; d < basis_[i].size(); ++d) {
      const double left = basis_[i][d], right = basis_[i + 1][d];
      basis_[i][d] = cosine * left + sine * right;
      basis_[i + 1][d] = cosine * right - sine * left;
    }
  });
  basis_.pop_back();
}

void OrthogonalFactor::solve(std::vector<double>& x) const {
  factor_.solve_lower(x.data());
  factor_.solve_upper(x.data());
}

void OrthogonalFactor::add_step(std::vector<double> residual, std::vector<double>& s) const {
  factor_.solve_lower(residual.data());
  for (std::size_t i = 0; i < basis_.size(); ++i)
    add_scaled(residual[i], basis_[i].data(), head_.latents(), s.data());
}

}  // namespace tacext
