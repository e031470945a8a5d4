#pragma once

#include <cstdint>
#include <vector>

#include "certificate.h"
#include "tacext/minimal_perturbation.h"

namespace tacext {

/// Writes answers in the caller's units. What was solved has rows of W diag(scale) 2^-e and margins
/// 2^-f, so that s is scale 2^(f - e) and l is 2^(f - 2 e) times what was found. Where that leaves
/// the range of a double, what is stored is not what was certified, and the class is not optimal.
class ResultWriter {
 public:
  ResultWriter(const PerturbationProblem& problem, int head_exponent);

  /// Row i of the result; every field is written.
  void write(const Candidate& found, int margin_exponent, std::int64_t i,
             const PerturbationResult& result) const;

 private:
  bool store_perturbation(const std::vector<double>& found, int exponent, double* s) const;

  std::int64_t classes_, latents_;
  int head_exponent_;
  // scale_d = factors_[d] * 2^exponents_[d]; empty without a scale.
  std::vector<double> factors_;
  std::vector<std::int64_t> exponents_;
  std::int64_t least_ = 0, most_ = 0;  // of exponents_
};

}  // namespace tacext
