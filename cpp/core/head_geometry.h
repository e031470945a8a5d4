#pragma once

#include <cstdint>
#include <vector>

#include "doubled.h"
#include "linear_algebra.h"
#include "tacext/minimal_perturbation.h"

namespace tacext {

/// What all classes of one head share: the scaled rows of W and, where it pays, their Gram matrix
/// K.
///
/// Rows are W, centred, times diag(scale) 2^-exponent. Adding a vector to every w_j changes no
/// problem, and a large common component would drown K's differences; a latent is centred only
/// where no entry of it rounds. The power of two keeps squares within the range of a double. It,
/// too, is exact, but for entries some 1e300 below the others, which become 0: a proof that must
/// not miss those takes the rows as they were given. A scale rounds each entry once.
///
/// K costs C^2 D / 2 multiplications and C^2 doubles, so a large head goes without: its products
/// are computed as they are needed. So does a head of which few classes are asked.
class HeadGeometry {
 public:
  HeadGeometry(const PerturbationProblem& problem, const ParallelFor& parallel_for);

  std::int64_t classes() const { return classes_; }
  std::int64_t latents() const { return latents_; }
  int exponent() const { return exponent_; }
  const double* row(std::int64_t j) const { return weight_.data() + j * latents_; }
  /// Row j of W, neither centred nor scaled.
  const double* given_row(std::int64_t j) const { return given_ + j * latents_; }
  /// An entry for latent d of a combination of given rows -> one of the scaled rows.
  double in_scaled_unit(double entry, std::int64_t d) const;
  double row_length(std::int64_t j) const { return row_lengths_[j]; }
  const PackedRows& packed() const { return packed_; }

  bool has_gram() const { return !gram_.empty(); }
  /// Row j of K; only where has_gram().
  const double* gram_row(std::int64_t j) const { return gram_.data() + j * classes_; }
  /// w_i . w_j
  double product(std::int64_t i, std::int64_t j) const {
    return has_gram() ? gram_row(i)[j] : dot(row(i), row(j), latents_);
  }

  /// How far w_k . x - w_j . x can be from a_j . x by the rounding of the two products, in units of
  /// |x|: where rows lie close together, that is much more than the rounding of constraint_dot.
  double difference_noise(std::int64_t k, std::int64_t j) const {
    return most_product_noise_ * (row_lengths_[k] + row_lengths_[j]);
  }
  /// How far it usually is, at most: no proof, but what prices need to tell noise from a violation.
  double usual_difference_noise(std::int64_t k, std::int64_t j) const {
    return usual_product_noise_ * (row_lengths_[k] + row_lengths_[j]);
  }

  /// a_j . s = (w_k - w_j) . s
  double constraint_dot(std::int64_t k, std::int64_t j, const double* s) const {
    return dot_difference(row(k), row(j), s, latents_);
  }
  /// The same in doubled precision.
  Doubled constraint_dot_doubled(std::int64_t k, std::int64_t j, const double* s) const {
    return dot_difference_doubled(row(k), row(j), s, latents_);
  }

  /// sum_d |a_jd s_d|: what the rounding of constraint_dot is relative to.
  double constraint_dot_size(std::int64_t k, std::int64_t j, const double* s) const {
    return dot_difference_size(row(k), row(j), s, latents_);
  }

  /// |a_j|^2 for all j of class k, whose row of K is given; from W where K's differences cancel.
  std::vector<double> squared_lengths(std::int64_t k, const double* gram_row) const;

 private:
  std::int64_t classes_, latents_;
  const double *given_, *scale_;  // the problem's, which outlives this
  int exponent_ = 0;
  std::vector<double> weight_;
  PackedRows packed_;
  std::vector<double> row_squares_, row_lengths_;  // |w_j|^2, |w_j|
  // Rounding of w_j . x, as a share of |w_j| |x|: the bound, and what to expect.
  double most_product_noise_, usual_product_noise_;
  std::vector<double> gram_;
};

}  // namespace tacext
