#include "tacext/pairwise_margin_quantile.h"

#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "logits.h"

namespace tacext {
namespace {

constexpr const char* kQuantile = "pairwise_margin_quantile";
constexpr const char* kLargest = "pairwise_margin_largest";

template <class Margin>
bool has_nan(const Margin* values, int64_t count) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= values[i] != values[i];
  return found;
}

Tensor quantile_cpu(const Tensor& logits, int64_t keep) {
  check_logits(kQuantile, logits);
  check_some_samples(kQuantile, logits);
  const int64_t samples = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(keep >= 1 && keep <= samples, kQuantile, ": keep: expected 1 to ", samples,
                  ", the samples, got ", keep, "; it is the rank of the difference wanted");
  Tensor margins = torch::stable::new_empty(logits, {classes, classes}, margin_type(logits));
  with_finite_logits(kQuantile, logits, [&](const auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    pairwise_margin_quantile(data, samples, classes, keep, mutable_data<MarginOf<T>>(margins),
                             torch_parallel);
  });
  return margins;
}

void largest_cpu(Tensor largest, const Tensor& logits) {
  check_logits(kLargest, logits);
  check_dim(kLargest, "out", largest, 3);
  const int64_t samples = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(largest.size(0) == classes && largest.size(1) == classes && largest.size(2) >= 1,
                  kLargest, ": out: expected shape [", classes, ", ", classes,
                  ", at least 1], got [", largest.size(0), ", ", largest.size(1), ", ",
                  largest.size(2), "]; start from a new one full of -inf");
  check_updated(kLargest, "out", largest, logits);
  with_finite_logits(kLargest, logits, [&](const auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    // No difference is above a NaN: it would hold a place for good.
    STD_TORCH_CHECK(!has_nan(const_data<MarginOf<T>>(largest), classes * classes * largest.size(2)),
                    kLargest,
                    ": out: expected values without NaN, got NaN; start from a new one "
                    "full of -inf");
    pairwise_margin_largest(data, samples, classes, largest.size(2),
                            mutable_data<MarginOf<T>>(largest), torch_parallel);
  });
}

}  // namespace
}  // namespace tacext

// On CUDA both are made of torch's own operators: see ops.py.
STABLE_TORCH_LIBRARY_FRAGMENT(tacext, m) {
  m.def("pairwise_margin_quantile(Tensor logits, int keep) -> Tensor");
  m.def("pairwise_margin_largest_(Tensor(a!) largest, Tensor logits) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CPU, m) {
  m.impl("pairwise_margin_quantile", TORCH_BOX(&tacext::quantile_cpu));
  m.impl("pairwise_margin_largest_", TORCH_BOX(&tacext::largest_cpu));
}
