#pragma once

#include <cstdint>
#include <vector>

#include "linear_algebra.h"
#include "tacext/minimal_perturbation.h"

namespace tacext {

/// What all classes of one head share: the scaled rows of W, their Gram matrix K.
///
/// Rows are W diag(scale), minus their mean where that removes most of their length: adding a
/// vector to every w_j changes no problem, and a large common component would drown K's
/// differences.
class HeadGeometry {
 public:
  HeadGeometry(const PerturbationProblem& problem, const ParallelFor& parallel_for);

  std::int64_t classes() const { return classes_; }
  std::int64_t latents() const { return latents_; }
  const double* row(std::int64_t j) const { return weight_.data() + j * latents_; }
  const double* gram_row(std::int64_t j) const { return gram_.data() + j * classes_; }
  const PackedRows& packed() const { return packed_; }

  /// a_j . s = (w_k - w_j) . s
  double constraint_dot(std::int64_t k, std::int64_t j, const double* s) const {
    return dot_difference(row(k), row(j), s, latents_);
  }

  /// sum_d |a_jd s_d|: what the rounding of constraint_dot is relative to.
  double constraint_dot_size(std::int64_t k, std::int64_t j, const double* s) const;

  /// |a_j|^2 for all j of class k; from K, or from W where K's differences cancel.
  std::vector<double> squared_norms(std::int64_t k) const;

 private:
  std::int64_t classes_, latents_;
  std::vector<double> weight_;
  PackedRows packed_;
  std::vector<double> gram_;
};

}  // namespace tacext
