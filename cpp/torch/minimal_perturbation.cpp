#include "minimal_perturbation.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "tacext/find_non_finite.h"

namespace tacext {
namespace {

constexpr const char* kOperation = kMinimalPerturbation;

bool is_single(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }

/// Doubles as doubles, floats as floats; half types fit into floats.
Tensor as_given(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Double) return torch::stable::contiguous(t);
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
}

void check_shapes(const Tensor& weight, const Tensor& margins, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& classes) {
  check_dim(kOperation, "weight", weight, 2);
  check_floating(kOperation, "weight", weight);
  STD_TORCH_CHECK(weight.size(0) >= 2 && weight.size(1) >= 1, kOperation,
                  ": weight: expected at least 2 classes and 1 latent, got shape [", weight.size(0),
                  ", ", weight.size(1), "]; pass the head's weight [classes, latents]");
  check_dim(kOperation, "margins", margins, 2);
  check_floating(kOperation, "margins", margins);
  STD_TORCH_CHECK(margins.size(0) == weight.size(0) && margins.size(1) == weight.size(0),
                  kOperation, ": margins: expected shape [", weight.size(0), ", ", weight.size(0),
                  "], got [", margins.size(0), ", ", margins.size(1),
                  "]; pass pairwise_margin_max of the same head's logits");
  check_same_device(kOperation, "margins", margins, "weight", weight);
  if (scale) {
    check_dim(kOperation, "scale", *scale, 1);
    check_floating(kOperation, "scale", *scale);
    STD_TORCH_CHECK(scale->size(0) == weight.size(1), kOperation, ": scale: expected ",
                    weight.size(1), " values, one a latent, got ", scale->size(0),
                    "; pass one scale for each column of weight");
    check_same_device(kOperation, "scale", *scale, "weight", weight);
  }
  if (classes) {
    check_dim(kOperation, "classes", *classes, 1);
    STD_TORCH_CHECK(classes->scalar_type() == ScalarType::Long, kOperation,
                    ": classes: expected int64, got ", dtype_name(*classes),
                    "; convert it with .long()");
    check_same_device(kOperation, "classes", *classes, "weight", weight);
  }
}

/// As SolverSettings is checked in Python, which callers of the bare operator do without.
void check_settings(const SolverSettings& settings) {
  STD_TORCH_CHECK(settings.tolerance > 0 && settings.tolerance < 1, kOperation,
                  ": tolerance: expected a number between 0 and 1, got ", settings.tolerance,
                  "; the default is 1e-9");
  STD_TORCH_CHECK(settings.max_iterations >= 0, kOperation,
                  ": max_iterations: expected 0 (automatic) or more, got ", settings.max_iterations,
                  "; leave it out");
}

void check_finite(const char* argument, const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1);
  check_no_bad_value(argument,
                     is_single(t)
                         ? find_non_finite(const_data<float>(t), rows, columns, torch_parallel)
                         : find_non_finite(const_data<double>(t), rows, columns, torch_parallel));
}

}  // namespace

PerturbationProblem PerturbationInputs::problem() const {
  const int64_t count = classes ? classes->size(0) : weight.size(0);
  return {const_data<double>(weight),
          is_single(margins) ? nullptr : const_data<double>(margins),
          scale ? const_data<double>(*scale) : nullptr,
          classes ? const_data<int64_t>(*classes) : nullptr,
          count,
          weight.size(0),
          weight.size(1),
          is_single(margins) ? const_data<float>(margins) : nullptr};
}

// Margins of a problem that never saw a sample are -inf off the diagonal; that, too, is caught
// here.
void check_no_bad_value(const char* argument, MatrixIndex bad) {
  STD_TORCH_CHECK(bad.row < 0, kOperation, ": ", argument,
                  ": expected finite values, got NaN or infinity at [", bad.row, ", ", bad.column,
                  "]; check the model and its inputs");
}

void check_scale_and_classes(const PerturbationInputs& inputs) {
  if (inputs.scale) {
    const double* scale = const_data<double>(*inputs.scale);
    for (int64_t d = 0; d < inputs.scale->size(0); ++d)
      STD_TORCH_CHECK(std::isfinite(scale[d]) && scale[d] > 0, kOperation,
                      ": scale: expected positive finite values, got ", scale[d], " at [", d,
                      "]; floor it at a small positive value");
  }
  if (inputs.classes) {
    const int64_t* classes = const_data<int64_t>(*inputs.classes);
    for (int64_t i = 0; i < inputs.classes->size(0); ++i)
      STD_TORCH_CHECK(classes[i] >= 0 && classes[i] < inputs.weight.size(0), kOperation,
                      ": classes: expected indices from 0 to ", inputs.weight.size(0) - 1, ", got ",
                      classes[i], " at [", i, "]; pass row numbers of weight");
  }
}

PerturbationInputs prepare(const Tensor& weight, const Tensor& margins,
                           const std::optional<Tensor>& scale, const std::optional<Tensor>& classes,
                           const SolverSettings& settings, MarginType margin_type) {
  check_shapes(weight, margins, scale, classes);
  check_settings(settings);
  PerturbationInputs inputs{
      as_float64(weight),
      margin_type == MarginType::kDouble ? as_float64(margins) : as_given(margins), std::nullopt,
      std::nullopt};
  if (scale) inputs.scale = as_float64(*scale);
  if (classes) inputs.classes = torch::stable::contiguous(*classes);
  return inputs;
}

PerturbationTensors empty_result(const Tensor& like, const PerturbationProblem& p) {
  const auto make = [&](std::initializer_list<int64_t> size, ScalarType type) {
    return torch::stable::new_empty(like, {size.begin(), size.size()}, type);
  };
  return {make({p.count, p.latents}, ScalarType::Double),
          make({p.count}, ScalarType::Double),
          make({p.count, p.classes}, ScalarType::Double),
          make({p.count}, ScalarType::Int),
          make({p.count}, ScalarType::Long),
          make({p.count}, ScalarType::Long),
          make({p.count}, ScalarType::Double),
          make({p.count}, ScalarType::Double),
          make({p.count}, ScalarType::Double)};
}

PerturbationResult pointers(const PerturbationTensors& r) {
  return {mutable_data<double>(std::get<0>(r)),  mutable_data<double>(std::get<1>(r)),
          mutable_data<double>(std::get<2>(r)),  mutable_data<int32_t>(std::get<3>(r)),
          mutable_data<int64_t>(std::get<4>(r)), mutable_data<int64_t>(std::get<5>(r)),
          mutable_data<double>(std::get<6>(r)),  mutable_data<double>(std::get<7>(r)),
          mutable_data<double>(std::get<8>(r))};
}

namespace {

PerturbationTensors minimal_perturbation_cpu(const Tensor& weight, const Tensor& margins,
                                             const std::optional<Tensor>& scale,
                                             const std::optional<Tensor>& classes, double tolerance,
                                             int64_t max_iterations, bool closed_form) {
  const SolverSettings settings{tolerance, max_iterations, closed_form};
  const PerturbationInputs inputs =
      prepare(weight, margins, scale, classes, settings, MarginType::kAsGiven);
  check_finite("weight", inputs.weight);
  check_finite("margins", inputs.margins);
  check_scale_and_classes(inputs);
  const PerturbationProblem problem = inputs.problem();
  const PerturbationTensors result = empty_result(inputs.weight, problem);
  minimal_perturbation(problem, settings, pointers(result), torch_parallel);
  return result;
}

}  // namespace

#ifndef TACEXT_WITH_CUDA
PerturbationTensors minimal_perturbation_cuda(const Tensor&, const Tensor&,
                                              const std::optional<Tensor>&,
                                              const std::optional<Tensor>&, double, int64_t, bool) {
  throw_built_without_cuda(kOperation);
}
#endif

}  // namespace tacext

STABLE_TORCH_LIBRARY_FRAGMENT(tacext, m) {
  m.def(
      "minimal_perturbation(Tensor weight, Tensor margins, Tensor? scale=None, "
      "Tensor? classes=None, float tolerance=1e-09, int max_iterations=0, bool closed_form=True) "
      "-> "
      "(Tensor perturbation, Tensor norm, Tensor multipliers, Tensor status, Tensor iterations, "
      "Tensor active, Tensor primal_residual, Tensor dual_residual, Tensor gap)");
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CPU, m) {
  m.impl("minimal_perturbation", TORCH_BOX(&tacext::minimal_perturbation_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CUDA, m) {
  m.impl("minimal_perturbation", TORCH_BOX(&tacext::minimal_perturbation_cuda));
}
