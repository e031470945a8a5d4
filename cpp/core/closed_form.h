#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "head_geometry.h"

namespace tacext {

/// The closed form in which every constraint of a class is active: one Cholesky factor for all.
///
/// All active means W s = t 1 - m, so s = W^T mu with (K + c 11^T) mu = t 1 - m and 1^T mu = 0;
/// c > 0 is free, as 1^T mu = 0, and repairs the K of a centred head. Multipliers: l_j = -mu_j.
class ClosedForm {
 public:
  /// Null where the constraints cannot all be independent (D < C - 1, equal rows, ...).
  static std::unique_ptr<ClosedForm> make(const HeadGeometry& head);
  ~ClosedForm();

  /// The multipliers [classes] that make every constraint j != target active with `margins` (row k;
  /// the target's own entry is not read); they may be negative. The target's own entry is 0.
  std::vector<double> multipliers(std::int64_t target, const double* margins) const;

 private:
  struct Factor;
  explicit ClosedForm(std::unique_ptr<Factor> factor);
  std::unique_ptr<Factor> factor_;
};

}  // namespace tacext
