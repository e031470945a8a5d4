#pragma once

#include <cstdint>
#include <vector>

#include "linear_algebra.h"
#include "tacext/minimal_perturbation.h"

namespace tacext {

/// What all classes of one head share: the scaled rows of W and, where it pays, their Gram matrix
/// K.
///
/// Rows are W diag(scale), minus their mean where that removes most of their length: adding a
/// vector to every w_j changes no problem, and a large common component would drown K's
/// differences.
///
/// K costs C^2 D / 2 multiplications and C^2 doubles, so a large head goes without: its products
/// are computed as they are needed. So does a head of which few classes are asked.
class HeadGeometry {
 public:
  HeadGeometry(const PerturbationProblem& problem, const ParallelFor& parallel_for);

  std::int64_t classes() const { return classes_; }
  std::int64_t latents() const { return latents_; }
  const double* row(std::int64_t j) const { return weight_.data() + j * latents_; }
  const PackedRows& packed() const { return packed_; }

  bool has_gram() const { return !gram_.empty(); }
  /// Row j of K; only where has_gram().
  const double* gram_row(std::int64_t j) const { return gram_.data() + j * classes_; }
  /// w_i . w_j
  double product(std::int64_t i, std::int64_t j) const {
    return has_gram() ? gram_row(i)[j] : dot(row(i), row(j), latents_);
  }

  /// a_j . s = (w_k - w_j) . s
  double constraint_dot(std::int64_t k, std::int64_t j, const double* s) const {
    return dot_difference(row(k), row(j), s, latents_);
  }

  /// sum_d |a_jd s_d|: what the rounding of constraint_dot is relative to.
  double constraint_dot_size(std::int64_t k, std::int64_t j, const double* s) const;

  /// |a_j|^2 for all j of class k, whose row of K is given; from W where K's differences cancel.
  std::vector<double> squared_lengths(std::int64_t k, const double* gram_row) const;

 private:
  std::int64_t classes_, latents_;
  std::vector<double> weight_;
  PackedRows packed_;
  std::vector<double> row_squares_;  // |w_j|^2
  std::vector<double> gram_;
};

}  // namespace tacext
