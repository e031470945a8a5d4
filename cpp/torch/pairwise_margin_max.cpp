#include "tacext/pairwise_margin_max.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <type_traits>

#include "logits.h"

#ifdef TACEXT_WITH_CUDA
#include "cuda_launch.h"
#endif

namespace tacext {
namespace {

constexpr const char* kOperation = "pairwise_margin_max";

void check_out(const Tensor& out, const Tensor& logits) {
  const int64_t classes = logits.size(1);
  check_dim(kOperation, "out", out, 2);
  STD_TORCH_CHECK(out.size(0) == classes && out.size(1) == classes, kOperation,
                  ": out: expected shape [", classes, ", ", classes, "], got [", out.size(0), ", ",
                  out.size(1), "]; make it as the result for the first batch");
  check_updated(kOperation, "out", out, logits);
}

Tensor empty_margins(const Tensor& logits) {
  check_some_samples(kOperation, logits);
  const int64_t classes = logits.size(1);
  Tensor out = torch::stable::new_empty(logits, {classes, classes}, margin_type(logits));
  return torch::stable::fill_(out, -std::numeric_limits<double>::infinity());
}

void accumulate_cpu(Tensor out, const Tensor& logits) {
  check_logits(kOperation, logits);
  check_out(out, logits);
  with_finite_logits(kOperation, logits, [&](const auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    pairwise_margin_max(data, logits.size(0), logits.size(1), mutable_data<MarginOf<T>>(out),
                        torch_parallel);
  });
}

Tensor pairwise_margin_max_cpu(const Tensor& logits) {
  check_logits(kOperation, logits);
  Tensor out = empty_margins(logits);
  accumulate_cpu(out, logits);
  return out;
}

#ifdef TACEXT_WITH_CUDA
void accumulate_cuda(Tensor out, const Tensor& logits) {
  check_logits(kOperation, logits);
  check_out(out, logits);
  const CudaScope scope(logits);
  const Tensor rows = torch::stable::contiguous(logits);
  scope.check(kOperation, tacext_cuda_pairwise_margin_max(rows.const_data_ptr(), cuda_type(rows),
                                                          rows.size(0), rows.size(1),
                                                          out.mutable_data_ptr(), scope.stream()));
}

Tensor pairwise_margin_max_cuda(const Tensor& logits) {
  check_logits(kOperation, logits);
  Tensor out = empty_margins(logits);
  accumulate_cuda(out, logits);
  return out;
}
#else
void accumulate_cuda(Tensor, const Tensor&) { throw_built_without_cuda(kOperation); }
Tensor pairwise_margin_max_cuda(const Tensor&) { throw_built_without_cuda(kOperation); }
#endif

}  // namespace
}  // namespace tacext

STABLE_TORCH_LIBRARY_FRAGMENT(tacext, m) {
  m.def("pairwise_margin_max(Tensor logits) -> Tensor");
  m.def("pairwise_margin_max_(Tensor(a!) out, Tensor logits) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CPU, m) {
  m.impl("pairwise_margin_max", TORCH_BOX(&tacext::pairwise_margin_max_cpu));
  m.impl("pairwise_margin_max_", TORCH_BOX(&tacext::accumulate_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CUDA, m) {
  m.impl("pairwise_margin_max", TORCH_BOX(&tacext::pairwise_margin_max_cuda));
  m.impl("pairwise_margin_max_", TORCH_BOX(&tacext::accumulate_cuda));
}
