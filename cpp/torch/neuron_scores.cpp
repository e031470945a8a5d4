#include "tacext/neuron_scores.h"

#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "tensor_checks.h"

#ifdef TACEXT_WITH_CUDA
#include "cuda_launch.h"
#endif

namespace tacext {
namespace {

constexpr const char* kOperation = "neuron_scores";

void check(const Tensor& activation, const Tensor& gradient) {
  STD_TORCH_CHECK(activation.dim() >= 2, kOperation,
                  ": activation: expected [samples, channels, ...], got ", activation.dim(),
                  " dimensions; add a sample dimension");
  check_floating(kOperation, "activation", activation);
  bool same = activation.dim() == gradient.dim();
  for (int64_t d = 0; same && d < activation.dim(); ++d)
    same = activation.size(d) == gradient.size(d);
  STD_TORCH_CHECK(same, kOperation, ": gradient: expected shape ", shape_text(activation),
                  " like activation, got ", shape_text(gradient),
                  "; take the gradient with respect to that activation");
  STD_TORCH_CHECK(activation.scalar_type() == gradient.scalar_type(), kOperation,
                  ": gradient: expected ", dtype_name(activation), " like activation, got ",
                  dtype_name(gradient), "; convert one of them");
  check_same_device(kOperation, "gradient", gradient, "activation", activation);
  STD_TORCH_CHECK(activation.size(0) > 0, kOperation,
                  ": activation: expected at least 1 sample, got none; pass a non-empty batch");
}

int64_t positions_of(const Tensor& activation) {
  int64_t positions = 1;
  for (int64_t d = 2; d < activation.dim(); ++d) positions *= activation.size(d);
  return positions;
}

Tensor neuron_scores_cpu(const Tensor& activation, const Tensor& gradient) {
  check(activation, gradient);
  const Tensor a = torch::stable::contiguous(activation), g = torch::stable::contiguous(gradient);
  Tensor scores = torch::stable::new_empty(a, {a.size(1)}, ScalarType::Double);
  dispatch_floating(a.scalar_type(), [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    neuron_scores(const_data<T>(a), const_data<T>(g), a.size(0), a.size(1), positions_of(a),
                  mutable_data<double>(scores), torch_parallel);
  });
  return scores;
}

#ifdef TACEXT_WITH_CUDA
Tensor neuron_scores_cuda(const Tensor& activation, const Tensor& gradient) {
  check(activation, gradient);
  const CudaScope scope(activation);
  const Tensor a = torch::stable::contiguous(activation), g = torch::stable::contiguous(gradient);
  Tensor scores = torch::stable::new_empty(a, {a.size(1)}, ScalarType::Double);
  const int64_t samples = a.size(0), channels = a.size(1), positions = positions_of(a);
  const Tensor workspace = torch::stable::new_empty(
      a, {tacext_cuda_neuron_scores_workspace(samples, channels, positions)}, ScalarType::Double);
  scope.check(kOperation,
              tacext_cuda_neuron_scores(a.const_data_ptr(), g.const_data_ptr(), cuda_type(a),
                                        samples, channels, positions, mutable_data<double>(scores),
                                        mutable_data<double>(workspace), scope.stream()));
  return scores;
}
#else
Tensor neuron_scores_cuda(const Tensor&, const Tensor&) { throw_built_without_cuda(kOperation); }
#endif

}  // namespace
}  // namespace tacext

STABLE_TORCH_LIBRARY_FRAGMENT(tacext, m) {
  m.def("neuron_scores(Tensor activation, Tensor gradient) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CPU, m) {
  m.impl("neuron_scores", TORCH_BOX(&tacext::neuron_scores_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CUDA, m) {
  m.impl("neuron_scores", TORCH_BOX(&tacext::neuron_scores_cuda));
}
