#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "head_geometry.h"
#include "tacext/minimal_perturbation.h"

namespace tacext {

/// A class's answer in the scaled latent space, with the KKT residuals that vouch for it.
struct Candidate {
  Status status = Status::kIterationLimit;
  std::vector<double> perturbation;  // s, [latents]
  std::vector<double> multipliers;   // l >= 0, [classes]; a Farkas ray where unreachable
  std::vector<double> corrections;   // what the multipliers lost in rounding to doubles, or empty
  std::int64_t iterations = 0;
  double primal = 0, dual = 0, gap = 0;
  // (|s| + sum_j l_j |a_j|) / |s|: how much the sum that makes s cancels; 1 where s = 0.
  double collinearity = 1;

  double worst_residual() const { return std::max({primal, dual, gap}); }
};

double norm(const std::vector<double>& values);

/// active_i -> values_i over all classes, 0 elsewhere.
std::vector<double> spread(const std::vector<std::int64_t>& active,
                           const std::vector<double>& values, std::int64_t classes);

/// The multipliers are a ray: it gets sum 1.
void mark_unreachable(Candidate& candidate);

/// sum_i l_i a_i over the listed constraints of class k, a_i = w_k - w_i
std::vector<double> combine_constraints(const HeadGeometry& head, std::int64_t k,
                                        const std::vector<std::int64_t>& constraints,
                                        const std::vector<double>& multipliers);
std::vector<Doubled> combine_constraints_doubled(const HeadGeometry& head, std::int64_t k,
                                                 const std::vector<std::int64_t>& constraints,
                                                 const std::vector<double>& multipliers);

/// Residuals of class k's answer from a_j . s in doubled precision, with violations measured
/// against |M[k, j]| + sum_d |a_jd s_d|: of the careful way, whose constraints may nearly cancel.
/// The gap is that of the multipliers with their corrections: where sums l_j a_j cancel to 1e-12 of
/// their terms, multipliers that are doubles prove no norm to 1e-9.
void certify_doubled(const HeadGeometry& head, std::int64_t k, const double* margins,
                     const std::vector<double>& squared_lengths, double tolerance,
                     Candidate& candidate);

/// Residuals of class k's answer as PerturbationResult defines them, from W: they decide the
/// status. margins is row k of M, squared_lengths[j] is |a_j|^2, row_products[j] = w_j . s. Where
/// the rounding of these products could hide a violation, a_j . s is taken anew, differences first.
void certify(const HeadGeometry& head, std::int64_t k, const double* margins,
             const std::vector<double>& squared_lengths, const double* row_products,
             double tolerance, Candidate& candidate);

}  // namespace tacext
