#pragma once

#include <cstdint>

#include "tacext/export.h"
#include "tacext/half.h"
#include "tacext/parallel.h"

namespace tacext {

/// margins[k, j] = the keep-th largest of logits[i, j] - logits[i, k] over the samples i.
///
/// With keep = 1 that is pairwise_margin_max. logits [samples, classes] and margins
/// [classes, classes] are row-major, the logits finite, 1 <= keep <= samples. The result is one of
/// the rounded differences, whatever the number of threads. Scratch: a copy of the logits, class by
/// class, in the type of the margins. T: float, Half, BFloat16 with float margins; double with
/// double margins.
template <class T, class Margin>
TACEXT_API void pairwise_margin_quantile(const T* logits, std::int64_t samples,
                                         std::int64_t classes, std::int64_t keep, Margin* margins,
                                         const ParallelFor& parallel_for);

/// The streaming form: largest[k, j] holds the `keep` largest differences seen so far, in no order
/// and filled up with -infinity, and is updated with those of these samples. Merging two shards is
/// keeping the largest of both. largest is [classes, classes, keep], row-major.
template <class T, class Margin>
TACEXT_API void pairwise_margin_largest(const T* logits, std::int64_t samples, std::int64_t classes,
                                        std::int64_t keep, Margin* largest,
                                        const ParallelFor& parallel_for);

}  // namespace tacext
