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

}  // namespace tacext
