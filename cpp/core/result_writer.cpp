#include "result_writer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "linear_algebra.h"
#include "simd.h"

namespace tacext {
namespace {

constexpr double kSmallest = std::numeric_limits<double>::min();
constexpr double kLargest = std::numeric_limits<double>::max();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// Whether `stored` has all digits of `found`, of which it is a multiple.
TACEXT_INLINE bool is_kept(double found, double stored) {
  const double size = std::fabs(stored);
  return (size >= kSmallest && size <= kLargest) || (stored == found && size < kInfinity);
}

/// Whether all digits are kept; values up to `negligible` need only be finite.
TACEXT_SIMD_CLONES bool all_kept(const double* found, const double* stored, std::int64_t count,
                                 double negligible) {
  std::int64_t lost = 0;
#pragma omp simd reduction(+ : lost)
  for (std::int64_t i = 0; i < count; ++i) {
    const bool nothing = std::fabs(found[i]) <= negligible && std::fabs(stored[i]) < kInfinity;
    lost += !(is_kept(found[i], stored[i]) | nothing);
  }
  return lost == 0;
}

/// to = values * factors * 2^(exponents + exponent), which must be within +-1000; rounded once.
TACEXT_SIMD_CLONES void scale_up(const double* values, const double* factors,
                                 const std::int64_t* exponents, std::int64_t count,
                                 std::int64_t exponent, double* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t bits =
        static_cast<std::int64_t>(static_cast<std::uint64_t>(exponents[i] + exponent + 1023) << 52);
    double power;
    std::memcpy(&power, &bits, sizeof power);
    to[i] = (values[i] * factors[i]) * power;
  }
}

}  // namespace

ResultWriter::ResultWriter(const PerturbationProblem& problem, int head_exponent)
    : classes_(problem.classes), latents_(problem.latents), head_exponent_(head_exponent) {
  if (problem.scale == nullptr) return;
  for (std::int64_t d = 0; d < latents_; ++d) {
    int exponent = 0;
    factors_.push_back(std::frexp(problem.scale[d], &exponent));
    exponents_.push_back(exponent);
  }
  least_ = *std::min_element(exponents_.begin(), exponents_.end());
  most_ = *std::max_element(exponents_.begin(), exponents_.end());
}

void ResultWriter::write(const Candidate& found, int margin_exponent, std::int64_t i,
                         const PerturbationResult& result) const {
  const int exponent = margin_exponent - head_exponent_;
  const bool unreachable = found.status == Status::kUnreachable;
  double* const s = result.perturbation + i * latents_;
  double* const l = result.multipliers + i * classes_;

  // A ray has sum 1: only its m.l has a unit. A multiplier, however small, may be of a long
  // constraint, so that none may lose digits.
  multiply_by_power_of_two(found.multipliers.data(), classes_,
                           unreachable ? 0 : exponent - head_exponent_, l);
  const bool kept_l = all_kept(found.multipliers.data(), l, classes_, 0);
  const double length = norm(found.perturbation);
  double stored_length = std::ldexp(length, exponent);
  const bool kept_s =
      store_perturbation(found.perturbation, exponent, s) && is_kept(length, stored_length);

  Status status = found.status;
  double primal = found.primal;
  if (status == Status::kOptimal && !(kept_s && kept_l)) {
    status = Status::kIterationLimit;
    primal = kInfinity;
  }
  const bool answer = kept_s && (status == Status::kOptimal || length > 0);
  if (!answer || unreachable) {
    std::fill_n(s, latents_, kNaN);
    stored_length = unreachable ? kInfinity : kNaN;
  }
  result.norm[i] = stored_length;
  result.status[i] = static_cast<std::int32_t>(status);
  result.iterations[i] = found.iterations;
  result.active[i] = std::count_if(l, l + classes_, [](double x) { return x > 0; });
  result.primal_residual[i] = primal;
  result.dual_residual[i] = found.dual;
  result.gap[i] = unreachable ? std::ldexp(found.gap, margin_exponent) : found.gap;
}

/// False where an entry loses digits that count beside the largest one.
bool ResultWriter::store_perturbation(const std::vector<double>& found, int exponent,
                                      double* s) const {
  constexpr std::int64_t kFactor = 1000;  // up to here 2^exponent is itself a double
  if (factors_.empty())
    multiply_by_power_of_two(found.data(), latents_, exponent, s);
  else if (exponent + least_ >= -kFactor && exponent + most_ <= kFactor)
    scale_up(found.data(), factors_.data(), exponents_.data(), latents_, exponent, s);
  else
    for (std::int64_t d = 0; d < latents_; ++d)
      s[d] = std::ldexp(found[d] * factors_[d], exponent + static_cast<int>(exponents_[d]));
  constexpr int kCounts = 60;  // an entry 2^-60 times the largest one counts
  const double largest = largest_magnitude(found.data(), latents_);
  const int least = exponent + static_cast<int>(least_), most = exponent + static_cast<int>(most_);
  if (std::ldexp(largest, least - 1 - kCounts) >= kSmallest &&
      std::ldexp(largest, most) <= kLargest)
    return true;
  return all_kept(found.data(), s, latents_, std::ldexp(largest, -kCounts));
}

}  // namespace tacext
