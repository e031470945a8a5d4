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
  std::int64_t iterations = 0;
  double primal = 0, dual = 0, gap = 0;
  // (|s| + sum_j l_j |a_j|) / |s|: how much the sum that makes s cancels; 1 where s = 0.
  double collinearity = 1;
  bool ray = false;  // the multipliers are meant as a Farkas ray, proven or not

  double worst_residual() const { return std::max({primal, dual, gap}); }
};

double norm(const std::vector<double>& values);

/// sum_i l_i a_i over the listed constraints of class k, a_i = w_k - w_i
std::vector<double> combine_constraints(const HeadGeometry& head, std::int64_t k,
                                        const std::vector<std::int64_t>& constraints,
                                        const std::vector<double>& multipliers);

/// Fills the residuals of class k, as PerturbationResult defines them, and lets them decide the
/// status. margins is row k of M, squared_lengths[j] is |a_j|^2, products[j] = a_j . s, and
/// sizes[j] is what a violation of constraint j is measured against beside |M[k, j]|.
void certify(const HeadGeometry& head, std::int64_t k, const double* margins,
             const std::vector<double>& squared_lengths, const double* products,
             const double* sizes, double tolerance, Candidate& candidate);

/// The same with row_products[j] = w_j . s, and violations measured against |a_j| |s|. Where the
/// rounding of the products could hide a violation, a_j . s is taken anew, differences first.
void certify(const HeadGeometry& head, std::int64_t k, const double* margins,
             const std::vector<double>& squared_lengths, const double* row_products,
             double tolerance, Candidate& candidate);

}  // namespace tacext
