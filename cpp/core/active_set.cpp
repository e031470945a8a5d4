#include "active_set.h"

namespace tacext::active_set {

Blocking first_blocking(const std::vector<double>& multipliers,
                        const std::vector<double>& coefficients) {
  constexpr double kRounding = 1e-12;
  double largest = 0;
  for (double c : coefficients) largest = std::max(largest, std::fabs(c));
  Blocking blocking;
  for (std::size_t i = 0; i < multipliers.size(); ++i) {
    if (coefficients[i] <= kRounding * largest) continue;
    const double step = multipliers[i] / coefficients[i];
    if (step < blocking.step) blocking = {step, static_cast<std::int64_t>(i)};
  }
  return blocking;
}

}  // namespace tacext::active_set
