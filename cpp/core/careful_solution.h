#pragma once

#include <cstdint>
#include <vector>

#include "certificate.h"
#include "head_geometry.h"

namespace tacext {

/// Class k from W itself instead of K, residuals in doubled precision: for what the fast way leaves
/// unproven and for constraints that nearly cancel, where s and l of the fast way are a small
/// difference of large terms. margins is row k of M, squared_lengths[j] is |a_j|^2.
Candidate solve_carefully(const HeadGeometry& head, std::int64_t k, const double* margins,
                          const std::vector<double>& squared_lengths, double tolerance,
                          std::int64_t max_iterations);

}  // namespace tacext
