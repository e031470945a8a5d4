#pragma once

#include <cstdint>

#include "tacext/export.h"
#include "tacext/half.h"
#include "tacext/parallel.h"

namespace tacext {

/// scores[c] = 1/samples * sum_i sum_p activation[i, c, p] * gradient[i, c, p].
///
/// activation and gradient are row-major [samples, channels, positions]; products and sums are in
/// double, in an order fixed by the sizes alone. With the gradient of <s, phi(x)> this is the
/// first-order share of channel c in the latent's component along s: what zeroing the channel takes
/// away. T: float, double, Half or BFloat16.
template <class T>
TACEXT_API void neuron_scores(const T* activation, const T* gradient, std::int64_t samples,
                              std::int64_t channels, std::int64_t positions, double* scores,
                              const ParallelFor& parallel_for);

}  // namespace tacext
