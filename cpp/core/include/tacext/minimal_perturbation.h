#pragma once

#include <cstdint>

#include "tacext/export.h"
#include "tacext/parallel.h"

namespace tacext {

/// How a class's problem ended.
enum class Status : std::int32_t {
  kOptimal = 0,         ///< the certificate holds within the tolerance
  kUnreachable = 1,     ///< no perturbation within reach of doubles; the multipliers prove it
  kIterationLimit = 2,  ///< ended before the certificate held
};

struct SolverSettings {
  /// Largest relative residual with which a class counts as optimal.
  double tolerance = 1e-9;
  /// Active-set steps a class, of all ways together; 0 means 50 * classes + 100.
  std::int64_t max_iterations = 0;
  /// Try the all-constraints-active closed form where it can apply.
  bool closed_form = true;
};

/// For each listed class k:  s_k = argmin 1/2 |s / scale|^2  s.t.  (w_k - w_j).s >= M[k, j], j !=
/// k.
struct PerturbationProblem {
  const double* weight;         ///< W, [classes, latents], row-major
  const double* margins;        ///< M, [classes, classes], row-major; the diagonal is not read
  const double* scale;          ///< [latents], positive; null means all ones
  const std::int64_t* targets;  ///< the classes k to solve for, [count]; null means 0, 1, ...
  std::int64_t count;
  std::int64_t classes;
  std::int64_t latents;
  const float* margins_single = nullptr;  ///< M instead of `margins`, where it is float
};

/// Where the answers go: one row for each listed class, all fields required.
///
/// An optimal class carries the KKT residuals of what is stored, recomputed from W, not from the
/// Gram matrix. An unreachable class has a NaN perturbation, an infinite norm and, as multipliers,
/// a Farkas ray l >= 0, scaled to sum 1, with m.l > 0 although sum_j l_j (w_k - w_j) = 0 to
/// rounding. Every s that satisfies the constraints has |s / scale| >= m.l / |sum_j l_j a_j|; that
/// bound is at least 1e13 natural units, sum_j l_j |m_j| / sum_j l_j |a_j|. A class with a longer
/// answer may end either way.
///
/// A class that ended before its certificate held keeps the s it came to, or a NaN s and a NaN norm
/// where it came to none, or to one that no double can hold. So ends, too, a class whose
/// multipliers no double can hold (a scale beyond 1e150): what is stored of them then is what is
/// left. An infinite primal residual beside an s says that digits were lost in storing, or that the
/// steps ran out before its proof. Of a ray that proves too little nothing is kept: multipliers are
/// 0, residuals infinite.
struct PerturbationResult {
  double* perturbation;      ///< s_k, [count, latents]
  double* norm;              ///< |s_k / scale|, [count]
  double* multipliers;       ///< l >= 0, [count, classes]; s_k = scale^2 * sum_j l_j (w_k - w_j)
  std::int32_t* status;      ///< Status, [count]
  std::int64_t* iterations;  ///< active-set steps, all told, 0 for the closed form, [count]
  std::int64_t* active;      ///< constraints with a positive multiplier, [count]
  /// max_j (M[k,j] - a_j.s)+ / (|M[k,j]| + |a_j| |s|), a_j = scaled w_k - w_j; where the active
  /// constraints nearly cancel, against the smaller |M[k,j]| + sum_d |a_jd s_d|, [count]
  double* primal_residual;
  /// |s - sum_j l_j a_j| / (|s| + sum_j l_j |a_j|); of a ray |sum_j l_j a_j| / sum_j l_j |a_j|
  double* dual_residual;
  /// |s.s - b| / max(s.s, |b|), where b = 2 m.l - |sum_j l_j a_j|^2 is at most the square of the
  /// optimal norm, whatever l >= 0: the duality gap, rigorous; where the active constraints nearly
  /// cancel, of l before it was rounded to doubles; for an unreachable class -m.l, [count]
  double* gap;
};

/// Solves every listed class, in double: from one Gram matrix where that pays, else from W. Throws
/// std::invalid_argument for fewer than 2 classes or 1 latent, a tolerance that is not between 0
/// and 1, or margins not given in one of their two types. That inputs are finite, scale positive
/// and targets in range is for the caller to check (find_non_finite.h): nothing is promised of a
/// class that meets a NaN, but that it ends. The same input gives the same bits for any
/// `parallel_for`. A class's answer does not depend on which others are listed with it beyond
/// rounding, which may differ where a list is so short that it is solved without the Gram matrix.
TACEXT_API void minimal_perturbation(const PerturbationProblem& problem,
                                     const SolverSettings& settings,
                                     const PerturbationResult& result,
                                     const ParallelFor& parallel_for);

}  // namespace tacext
