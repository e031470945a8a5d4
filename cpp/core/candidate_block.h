#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "active_set.h"
#include "cholesky.h"

namespace tacext {

/// G = A A^T of the active constraints as L L^T, and z = L^-1 m, so that the multipliers with which
/// exactly these constraints hold are L^-T z.
struct ActiveFactor {
  PackedCholesky lower;
  std::vector<double> z;

  std::int64_t size() const { return lower.size(); }
};

/// Inactive, violated constraints that are tried together, with what the active-set method needs to
/// know of each: kept from step to step, so that a step costs |block| * |active|.
///
///   Y [active, block]   column b is L^-1 G[active, b]: a_b seen from the active constraints
///   slack [block]       m_b - a_b . s
class CandidateBlock {
 public:
  /// |a_p - projection|^2 below this share of |a_p|^2 counts as linearly dependent. Generous, as K
  /// squares the condition number: what it decides is checked against W afterwards.
  static constexpr double kDependent = 1e-12;

  /// products(i, j) is a_i . a_j of the classes i and j.
  template <class Products>
  CandidateBlock(ActiveFactor& factor, const std::vector<std::int64_t>& active,
                 std::vector<std::int64_t> constraints, const Products& products)
      : factor_(factor), constraints_(std::move(constraints)) {
    reserve(static_cast<std::int64_t>(active.size()));
    for (std::size_t i = 0; i < active.size(); ++i)
      for (std::int64_t b = 0; b < size(); ++b)
        rows_[i * stride_ + b] = products(active[i], constraints_[b]);
    for (std::int64_t b = 0; b < size(); ++b)
      for (std::int64_t c = 0; c <= b; ++c)
        gram_[b * stride_ + c] = gram_[c * stride_ + b] =
            products(constraints_[b], constraints_[c]);
    eliminate_active();
  }

  std::int64_t size() const { return static_cast<std::int64_t>(constraints_.size()); }

  /// Makes as many of the block active at once as keep all multipliers positive, at most `most`.
  /// Leaves everything as it was and returns false where that takes one at a time.
  bool add_together(const double* margins, std::int64_t most, ActiveSet& set);

  /// One at a time, the furthest from holding first, until none is violated.
  Ending add_in_turn(const double* margins, const double* slack, const double* rounding,
                     std::int64_t max_iterations, ActiveSet& set);

  // ---- what satisfy asks for ----
  double project(std::int64_t p, std::vector<double>& coefficients);
  double slack(std::int64_t p) const { return slack_[p]; }
  double squared_length(std::int64_t p) const { return gram_[p * stride_ + p]; }
  std::int64_t constraint(std::int64_t p) const { return constraints_[p]; }
  void advance(double step);
  void append_projected();
  void remove(std::int64_t index);

 private:
  void reserve(std::int64_t active);
  void eliminate_active();
  const double* row(std::int64_t i) const { return rows_.data() + i * stride_; }
  double* row(std::int64_t i) { return rows_.data() + i * stride_; }

  ActiveFactor& factor_;
  std::vector<std::int64_t> constraints_;
  std::int64_t stride_ = 0;
  std::vector<double> rows_;  // Y, [at least active, stride]
  std::vector<double> gram_;  // a_b . a_c, [block, stride]
  std::vector<double> slack_, margins_;
  std::int64_t candidate_ = -1;
  double residual_ = 0;
  std::vector<double> projection_, rates_;  // of the candidate: its column of Y; a_b . z of all b
};

}  // namespace tacext
