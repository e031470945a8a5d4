#pragma once

#include <cstdint>
#include <vector>

#include "head_geometry.h"

namespace tacext {

/// What a ray l >= 0 of sum 1 proves: every s with a_j . s >= m_j has |s| >= m.l / |sum_j l_j a_j|.
struct RayProof {
  double value = 0;  // m.l
  double dual = 0;   // |sum_j l_j a_j| / sum_j l_j |a_j|
  bool holds = false;
};

/// The proof holds where that bound is at least 1e13 natural units, the mean of |m_j| / |a_j| that
/// the ray makes: beyond, doubles cannot tell a reachable class from an unreachable one. Sums are
/// in doubled precision and from the rows as they were given, so that nothing cancels or underflows
/// on the way. margins is row k of M, squared_lengths[j] is |a_j|^2 of the scaled rows.
RayProof prove_unreachable(const HeadGeometry& head, std::int64_t k, const double* margins,
                           const std::vector<double>& squared_lengths,
                           const std::vector<double>& ray);

}  // namespace tacext
