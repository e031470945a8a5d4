#pragma once

#include <cstdint>

#include "tacext/export.h"
#include "tacext/half.h"
#include "tacext/parallel.h"

namespace tacext {

/// Index into a row-major [rows, columns] matrix; row -1 means "none".
struct MatrixIndex {
  std::int64_t row = -1;
  std::int64_t column = -1;
};

/// The first NaN or infinity of a row-major [rows, columns] matrix in reading order, else row -1.
/// T: float, double, Half or BFloat16.
template <class T>
TACEXT_API MatrixIndex find_non_finite(const T* values, std::int64_t rows, std::int64_t columns,
                                       const ParallelFor& parallel_for);

/// margins[k, j] = max(margins[k, j], max_i (logits[i, j] - logits[i, k])), the max-plus product
/// behind the constraints (w_k - w_j).s >= M[k, j].
///
/// logits [samples, classes] and margins [classes, classes] are row-major and finite (check with
/// find_non_finite: a NaN would be dropped without a word). The differences are rounded once, in
/// the type of the margins; a maximum of rounded differences is the rounded maximum, so the result
/// is the correctly rounded one whatever the order. Scratch: 256 KiB a thread at most 21,000
/// classes, no C x C copy. T: float, Half, BFloat16 with float margins; double with double margins.
template <class T, class Margin>
TACEXT_API void pairwise_margin_max(const T* logits, std::int64_t samples, std::int64_t classes,
                                    Margin* margins, const ParallelFor& parallel_for);

}  // namespace tacext
