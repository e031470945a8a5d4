#pragma once

#include <cstdint>

#include "tacext/export.h"
#include "tacext/half.h"
#include "tacext/parallel.h"

namespace tacext {

/// margins[k, j] = max(margins[k, j], max_i (logits[i, j] - logits[i, k])), the max-plus product
/// behind the constraints (w_k - w_j).s >= M[k, j].
///
/// logits [samples, classes] and margins [classes, classes] are row-major and finite (check with
/// find_non_finite: a NaN would be dropped without a word). The differences are rounded once, in
/// the type of the margins; a maximum of rounded differences is the rounded maximum, so the result
/// is the correctly rounded one whatever the order. Scratch: about 40 MiB, no C x C copy. T: float,
/// Half, BFloat16 with float margins; double with double margins.
template <class T, class Margin>
TACEXT_API void pairwise_margin_max(const T* logits, std::int64_t samples, std::int64_t classes,
                                    Margin* margins, const ParallelFor& parallel_for);

}  // namespace tacext
