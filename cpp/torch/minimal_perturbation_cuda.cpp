#include <torch/headeronly/core/DeviceType.h>

#include <vector>

#include "cuda_launch.h"
#include "minimal_perturbation.h"

// The GPU solves, the CPU settles what the GPU could not certify.
namespace tacext {
namespace {

constexpr const char* kOperation = kMinimalPerturbation;

static_assert(TACEXT_CUDA_OPTIMAL == static_cast<int>(Status::kOptimal) &&
              TACEXT_CUDA_ITERATION_LIMIT == static_cast<int>(Status::kIterationLimit));

Tensor to_cpu(const Tensor& t) {
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

std::optional<Tensor> to_cpu(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return to_cpu(*t);
}

/// Searched on the GPU; reading the answer waits for the stream, so a bad value is reported by the
/// call that got it. The op waits for its statuses anyway.
void check_finite(const CudaScope& scope, const char* argument, const Tensor& t) {
  const int64_t columns = t.size(1);
  const Tensor first = torch::stable::new_empty(t, {1}, ScalarType::Long);
  scope.check(kOperation,
              tacext_cuda_first_non_finite(const_data<double>(t), t.size(0) * columns,
                                           mutable_data<int64_t>(first), scope.stream()));
  const int64_t at = *const_data<int64_t>(to_cpu(first));
  check_no_bad_value(argument, at < 0 ? MatrixIndex{} : MatrixIndex{at / columns, at % columns});
}

void launch(const CudaScope& scope, const PerturbationProblem& p, const SolverSettings& settings,
            const PerturbationTensors& result) {
  const PerturbationResult r = pointers(result);
  const tacext_cuda_perturbation_problem problem{
      p.weight,
      p.margins,
      p.scale,
      p.targets,
      p.count,
      p.classes,
      p.latents,
      settings.tolerance,
      settings.max_iterations > 0 ? settings.max_iterations : 50 * p.classes + 100};
  const tacext_cuda_perturbation_result out{r.perturbation,    r.norm,          r.multipliers,
                                            r.status,          r.iterations,    r.active,
                                            r.primal_residual, r.dual_residual, r.gap};
  const Tensor workspace = torch::stable::new_empty(
      std::get<0>(result),
      {tacext_cuda_minimal_perturbation_workspace(p.count, p.classes, p.latents)},
      ScalarType::Byte);
  scope.check(kOperation, tacext_cuda_minimal_perturbation(
                              &problem, &out, workspace.mutable_data_ptr(), scope.stream()));
}

/// Rows of the result whose class the GPU left open.
std::vector<int64_t> open_rows(const PerturbationTensors& result) {
  const Tensor status = to_cpu(std::get<3>(result));
  const int32_t* const values = const_data<int32_t>(status);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < status.size(0); ++i)
    if (values[i] != TACEXT_CUDA_OPTIMAL) rows.push_back(i);
  return rows;
}

/// to[rows[i]] = from[i], one copy for each run of neighbouring rows.
void copy_rows(const Tensor& from, const std::vector<int64_t>& rows, const Tensor& to) {
  Tensor source = from, target = to;
  for (size_t begin = 0, end; begin < rows.size(); begin = end) {
    for (end = begin + 1; end < rows.size() && rows[end] == rows[end - 1] + 1;) ++end;
    const int64_t length = static_cast<int64_t>(end - begin);
    Tensor part = torch::stable::narrow(target, 0, rows[begin], length);
    torch::stable::copy_(part,
                         torch::stable::narrow(source, 0, static_cast<int64_t>(begin), length));
  }
}

template <size_t... kField>
void copy_rows(const PerturbationTensors& from, const std::vector<int64_t>& rows,
               const PerturbationTensors& to, std::index_sequence<kField...>) {
  (copy_rows(std::get<kField>(from), rows, std::get<kField>(to)), ...);
}

/// Solves the open classes with the core, which also proves a class unreachable. It starts anew,
/// with the caller's limit for itself; the steps of both are counted.
void settle_on_cpu(const PerturbationInputs& inputs, const SolverSettings& settings,
                   const PerturbationTensors& result) {
  const std::vector<int64_t> rows = open_rows(result);
  if (rows.empty()) return;
  const PerturbationInputs host{to_cpu(inputs.weight), to_cpu(inputs.margins), to_cpu(inputs.scale),
                                to_cpu(inputs.classes)};
  PerturbationProblem problem = host.problem();
  std::vector<int64_t> targets = rows;
  if (problem.targets != nullptr)
    for (int64_t& target : targets) target = problem.targets[target];
  problem.targets = targets.data();
  problem.count = static_cast<int64_t>(targets.size());
  const PerturbationTensors settled = empty_result(host.weight, problem);
  minimal_perturbation(problem, settings, pointers(settled), torch_parallel);
  const Tensor device_steps = to_cpu(std::get<4>(result));
  int64_t* const steps = mutable_data<int64_t>(std::get<4>(settled));
  for (size_t i = 0; i < rows.size(); ++i) steps[i] += const_data<int64_t>(device_steps)[rows[i]];
  copy_rows(settled, rows, result,
            std::make_index_sequence<std::tuple_size_v<PerturbationTensors>>{});
}

}  // namespace

// closed_form concerns the CPU alone: where every constraint is active, the GPU's active set gets
// there too, or it is too large for the GPU.
PerturbationTensors minimal_perturbation_cuda(const Tensor& weight, const Tensor& margins,
                                              const std::optional<Tensor>& scale,
                                              const std::optional<Tensor>& classes,
                                              double tolerance, int64_t max_iterations,
                                              bool closed_form) {
  const SolverSettings settings{tolerance, max_iterations, closed_form};
  const PerturbationInputs inputs =
      prepare(weight, margins, scale, classes, settings, MarginType::kDouble);
  const CudaScope scope(inputs.weight);
  check_finite(scope, "weight", inputs.weight);
  check_finite(scope, "margins", inputs.margins);
  check_scale_and_classes(
      {inputs.weight, inputs.margins, to_cpu(inputs.scale), to_cpu(inputs.classes)});
  const PerturbationProblem problem = inputs.problem();
  const PerturbationTensors result = empty_result(inputs.weight, problem);
  if (problem.count == 0) return result;
  launch(scope, problem, settings, result);
  settle_on_cpu(inputs, settings, result);
  return result;
}

}  // namespace tacext
