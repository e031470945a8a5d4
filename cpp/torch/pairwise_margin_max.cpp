#include "tacext/find_non_finite.h"
#include "tacext/pairwise_margin_max.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <type_traits>

#include "tensor_checks.h"

#ifdef TACEXT_WITH_CUDA
#include "cuda_launch.h"
#endif

namespace tacext {
namespace {

constexpr const char* kOperation = "pairwise_margin_max";

ScalarType margin_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_logits(const Tensor& logits) {
  check_dim(kOperation, "logits", logits, 2);
  check_floating(kOperation, "logits", logits);
}

void check_out(const Tensor& out, const Tensor& logits) {
  const int64_t classes = logits.size(1);
  check_dim(kOperation, "out", out, 2);
  STD_TORCH_CHECK(out.size(0) == classes && out.size(1) == classes, kOperation,
                  ": out: expected shape [", classes, ", ", classes, "], got [", out.size(0), ", ",
                  out.size(1), "]; make it as the result for the first batch");
  STD_TORCH_CHECK(out.scalar_type() == margin_type(logits), kOperation,
                  ": out: expected float64 for float64 logits and float32 for the rest, got ",
                  dtype_name(out), "; make it as the result for the first batch");
  STD_TORCH_CHECK(out.is_contiguous(), kOperation,
                  ": out: expected a contiguous tensor, got a strided view; pass .contiguous()");
  check_same_device(kOperation, "out", out, "logits", logits);
}

Tensor empty_margins(const Tensor& logits) {
  STD_TORCH_CHECK(logits.size(0) > 0, kOperation,
                  ": logits: expected at least 1 sample, got none; pass a non-empty batch");
  const int64_t classes = logits.size(1);
  Tensor out = torch::stable::new_empty(logits, {classes, classes}, margin_type(logits));
  return torch::stable::fill_(out, -std::numeric_limits<double>::infinity());
}

template <class T>
void accumulate_typed(const Tensor& out, const Tensor& logits) {
  using Margin = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T* data = const_data<T>(logits);
  const int64_t samples = logits.size(0), classes = logits.size(1);
  const MatrixIndex bad = find_non_finite(data, samples, classes, torch_parallel);
  STD_TORCH_CHECK(bad.row < 0, kOperation,
                  ": logits: expected finite values, got NaN or infinity "
                  "at [",
                  bad.row, ", ", bad.column, "]; check the model and its inputs");
  pairwise_margin_max(data, samples, classes, mutable_data<Margin>(out), torch_parallel);
}

void accumulate_cpu(Tensor out, const Tensor& logits) {
  check_logits(logits);
  check_out(out, logits);
  const Tensor rows = torch::stable::contiguous(logits);
  dispatch_floating(rows.scalar_type(), [&](auto type) {
    accumulate_typed<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(out, rows);
  });
}

Tensor pairwise_margin_max_cpu(const Tensor& logits) {
  check_logits(logits);
  Tensor out = empty_margins(logits);
  accumulate_cpu(out, logits);
  return out;
}

#ifdef TACEXT_WITH_CUDA
void accumulate_cuda(Tensor out, const Tensor& logits) {
  check_logits(logits);
  check_out(out, logits);
  const CudaScope scope(logits);
  const Tensor rows = torch::stable::contiguous(logits);
  scope.check(kOperation, tacext_cuda_pairwise_margin_max(rows.const_data_ptr(), cuda_type(rows),
                                                          rows.size(0), rows.size(1),
                                                          out.mutable_data_ptr(), scope.stream()));
}

Tensor pairwise_margin_max_cuda(const Tensor& logits) {
  check_logits(logits);
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
