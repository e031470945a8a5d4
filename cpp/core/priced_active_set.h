#pragma once

#include <cstdint>
#include <vector>

#include "active_set.h"
#include "candidate_block.h"
#include "head_geometry.h"

namespace tacext {

/// The active-set method of one class, in rounds: all constraints are priced (how far is each from
/// holding at the present s?), the most violated become a block of candidates, and the method works
/// on these alone. A round costs |active| * C for the prices and |active|^2 * |block| in blocked
/// products, where one constraint at a time would cost |active| * C for each.
///
/// Every round ends with multipliers >= 0 that are optimal for the active constraints. In exact
/// arithmetic it also raises the dual objective, so that no active set returns; in doubles rounding
/// can make constraints come and go. So prices within their own rounding count as no violation, and
/// a check that finds the objective no larger than the last one did ends the method; what its
/// answer is worth, the certificate tells.
class PricedActiveSet {
 public:
  /// margins is row `target` of M, [classes]; gram_row is row `target` of K, [classes].
  PricedActiveSet(const HeadGeometry& head, std::int64_t target, const double* margins,
                  const double* gram_row, std::int64_t max_iterations);

  /// Rounds, priced from K, until nothing is violated or rounding hides what is gained; only one
  /// where the head has not all of K.
  void solve();

  /// Checks the answer with products of W itself, products[j] = w_j . s of the s that the
  /// multipliers make. Refines the multipliers or goes on with what is still violated, and returns
  /// false; true where nothing is left to do.
  bool check(const double* products);

  Ending ending() const { return ending_; }
  std::int64_t target() const { return target_; }
  const ActiveSet& set() const { return set_; }
  const std::vector<double>& squared_lengths() const { return squared_lengths_; }

 private:
  bool refine(const double* products);
  void price_by_gram();
  void take_prices(const double* products, double reach);
  double objective() const;
  std::vector<std::int64_t> most_violated() const;
  bool work_round(std::vector<std::int64_t> candidates);

  const HeadGeometry& head_;
  std::int64_t target_;
  const double *margins_, *gram_row_;
  std::int64_t max_iterations_;
  std::vector<double> squared_lengths_, lengths_;  // |a_j|^2, |a_j|
  std::vector<double> slack_, rounding_;  // m_j - a_j.s, and what its rounding is relative to
  ActiveSet set_;
  ActiveFactor factor_;
  Ending ending_ = Ending::kSolved;
  int refinements_ = 0;
  double residual_before_ = 0;
  double checked_objective_ = -1;  // of the last check
};

}  // namespace tacext
