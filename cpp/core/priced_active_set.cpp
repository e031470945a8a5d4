#include "priced_active_set.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace tacext {
namespace {

constexpr std::int64_t kBlock = 32;  // candidates of a round, at least
constexpr double kRefined = 2e-14;   // residual of the active constraints that needs no refinement
constexpr int kMostRefinements = 4;

}  // namespace

PricedActiveSet::PricedActiveSet(const HeadGeometry& head, std::int64_t target,
                                 const double* margins, const double* gram_row,
                                 std::int64_t max_iterations)
    : head_(head),
      target_(target),
      margins_(margins),
      gram_row_(gram_row),
      max_iterations_(max_iterations),
      squared_lengths_(head.squared_lengths(target, gram_row)),
      lengths_(squared_lengths_),
      slack_(margins, margins + head.classes()),  // at s = 0
      rounding_(slack_.size()) {
  for (double& length : lengths_) length = std::sqrt(length);
  for (std::size_t j = 0; j < slack_.size(); ++j) rounding_[j] = std::fabs(slack_[j]);
}

void PricedActiveSet::solve() {
  double before = objective();
  while (work_round(most_violated()) && head_.has_gram()) {
    price_by_gram();
    const double now = objective();
    if (!(now > before)) return;
    before = now;
  }
}

bool PricedActiveSet::check(const double* products) {
  if (ending_ != Ending::kSolved) return true;
  if (refine(products)) return false;
  take_prices(products, std::sqrt(objective()));
  std::vector<std::int64_t> violated = most_violated();
  if (violated.empty()) return true;
  if (!(objective() > checked_objective_)) {
    ending_ = Ending::kIterationLimit;
    return true;
  }
  checked_objective_ = objective();
  refinements_ = 0;
  if (work_round(std::move(violated)) && head_.has_gram()) {
    price_by_gram();
    solve();
  }
  return false;
}

/// One step of iterative refinement, l += (A A^T)^-1 (m - A s) over the active constraints, unless
/// they hold to rounding already or the last step did not help.
bool PricedActiveSet::refine(const double* products) {
  std::vector<double> residual;
  double worst = 0, size = 0;
  for (std::int64_t j : set_.active) {
    residual.push_back(margins_[j] - (products[target_] - products[j]));
    worst = std::max(worst, std::fabs(residual.back()));
    size = std::max(size, std::fabs(margins_[j]));
  }
  if (worst <= kRefined * size || refinements_ == kMostRefinements) return false;
  if (refinements_ > 0 && !(worst <= 0.5 * residual_before_)) return false;
  ++refinements_;
  residual_before_ = worst;
  factor_.lower.solve_lower(residual.data());
  factor_.lower.solve_upper(residual.data());
  for (std::size_t i = 0; i < residual.size(); ++i)
    set_.multipliers[i] = std::max(0.0, set_.multipliers[i] + residual[i]);
  return true;
}

/// W s = sum_i l_i (K_k - K_i), a row of K for each active constraint.
void PricedActiveSet::price_by_gram() {
  std::vector<const double*> rows;
  double reach = 0;
  for (std::size_t i = 0; i < set_.active.size(); ++i) {
    rows.push_back(head_.gram_row(set_.active[i]));
    reach += set_.multipliers[i] * (head_.row_length(target_) + head_.row_length(set_.active[i]));
  }
  std::vector<double> products(slack_.size());
  weighted_differences(gram_row_, rows, set_.multipliers.data(), head_.classes(), products.data());
  take_prices(products.data(), reach);
}

/// `reach` is the length that the rounding of the products is relative to.
void PricedActiveSet::take_prices(const double* products, double reach) {
  const double length = std::sqrt(objective()), noise = reach / active_set::kViolated;
  for (std::int64_t j = 0; j < head_.classes(); ++j) {
    slack_[j] = margins_[j] - (products[target_] - products[j]);
    rounding_[j] = std::fabs(margins_[j]) + lengths_[j] * length +
                   head_.usual_difference_noise(target_, j) * noise;
  }
  for (std::int64_t j : set_.active) slack_[j] = 0;  // complementary slackness, free of rounding
}

/// m.l, on the active set the same as s.s = l.G l.
double PricedActiveSet::objective() const {
  double sum = 0;
  for (std::size_t i = 0; i < set_.active.size(); ++i)
    sum += set_.multipliers[i] * margins_[set_.active[i]];
  return std::max(sum, 0.0);
}

/// The constraints furthest (in distance) from holding, that one first; one of length 0, which
/// cannot hold at all, is infinitely far.
std::vector<std::int64_t> PricedActiveSet::most_violated() const {
  std::vector<std::pair<double, std::int64_t>> violated;
  for (std::int64_t j = 0; j < head_.classes(); ++j) {
    if (j == target_ || !(slack_[j] > active_set::kViolated * rounding_[j])) continue;
    if (!(squared_lengths_[j] < std::numeric_limits<double>::infinity())) continue;
    violated.emplace_back(-slack_[j] / lengths_[j], j);
  }
  const std::size_t most =
      static_cast<std::size_t>(std::max(kBlock, static_cast<std::int64_t>(set_.active.size()) / 2));
  if (violated.size() > most) {
    std::nth_element(violated.begin(), violated.begin() + most, violated.end());
    violated.resize(most);
  }
  std::sort(violated.begin(), violated.end());
  std::vector<std::int64_t> constraints;
  for (const auto& [distance, j] : violated) constraints.push_back(j);
  return constraints;
}

/// A round's work on its candidates; false where there were none or the method ended.
bool PricedActiveSet::work_round(std::vector<std::int64_t> candidates) {
  if (candidates.empty()) return false;
  if (squared_lengths_[candidates[0]] == 0) {  // 0 . s >= m with m > 0
    set_.active = {candidates[0]};
    set_.multipliers = {1.0};
    ending_ = Ending::kUnreachable;
    return false;
  }
  CandidateBlock block(
      factor_, set_.active, std::move(candidates), [this](std::int64_t i, std::int64_t j) {
        // G[i, j] = K[k, k] - K[k, i] - K[k, j] + K[i, j]
        return i == j ? squared_lengths_[i]
                      : (gram_row_[target_] - gram_row_[i]) - (gram_row_[j] - head_.product(i, j));
      });
  if (block.add_together(margins_, max_iterations_ - set_.iterations, set_)) return true;
  ending_ = block.add_in_turn(margins_, slack_.data(), rounding_.data(), max_iterations_, set_);
  return ending_ == Ending::kSolved;
}

}  // namespace tacext
