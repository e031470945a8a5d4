#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "tacext/find_non_finite.h"
#include "tacext/minimal_perturbation.h"
#include "tensor_checks.h"

// What the CPU and the CUDA glue of minimal_perturbation share.
namespace tacext {

constexpr const char* kMinimalPerturbation = "minimal_perturbation";

// perturbation, norm, multipliers, status, iterations, active, primal_residual, dual_residual, gap
using PerturbationTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// How margins reach the solver: a large head's are its largest input, which a copy would double.
enum class MarginType { kDouble, kAsGiven };

/// The inputs, contiguous and in double, with the margins in double or float; the tensors own what
/// the problem points to.
struct PerturbationInputs {
  Tensor weight, margins;
  std::optional<Tensor> scale, classes;

  PerturbationProblem problem() const;
};

/// Checks shapes, dtypes, devices and settings, and converts.
PerturbationInputs prepare(const Tensor& weight, const Tensor& margins,
                           const std::optional<Tensor>& scale, const std::optional<Tensor>& classes,
                           const SolverSettings& settings, MarginType margin_type);

/// Throws where a NaN or an infinity was found.
void check_no_bad_value(const char* argument, MatrixIndex bad);

/// Checks the values of scale and classes, which must lie in host memory.
void check_scale_and_classes(const PerturbationInputs& inputs);

/// Uninitialised tensors for every field of a result, on the device of `like`.
PerturbationTensors empty_result(const Tensor& like, const PerturbationProblem& problem);

PerturbationResult pointers(const PerturbationTensors& result);

PerturbationTensors minimal_perturbation_cuda(const Tensor& weight, const Tensor& margins,
                                              const std::optional<Tensor>& scale,
                                              const std::optional<Tensor>& classes,
                                              double tolerance, int64_t max_iterations,
                                              bool closed_form);

}  // namespace tacext
