#pragma once

#include "active_set_block.cuh"

// What cpp/core/certificate.cpp computes for a solved class, for one block of threads: the KKT
// residuals of what is stored, recomputed from the rows of W. No CUDA here either; the Block policy
// is that of active_set_block.cuh.
namespace tacext::cuda {

/// A class's row of tacext_cuda_perturbation_result.
struct Answer {
  double* perturbation;
  double* norm;
  double* multipliers;
  std::int32_t* status;
  std::int64_t* iterations;
  std::int64_t* active;
  double* primal_residual;
  double* dual_residual;
  double* gap;
};

constexpr std::int32_t kStatusOptimal = 0;
constexpr std::int32_t kStatusIterationLimit = 2;

template <class Block>
class Certifier {
 public:
  /// products[j] = s . w_j; scale may be null.
  TACEXT_DEVICE Certifier(Block& block, const Head& head, const Slot& slot, std::int64_t target,
                          const double* margins, const double* products, const double* scale)
      : block_(block),
        head_(head),
        slot_(slot),
        target_(target),
        margins_(margins),
        products_(products),
        scale_(scale) {}

  /// Fills the class's answer. Unproven is kStatusIterationLimit: the CPU settles it.
  TACEXT_DEVICE void write(const Outcome& outcome, double tolerance, const Answer& answer) {
    const bool solved = outcome.ending == Ending::kSolved;
    Residuals residuals;
    if (solved) residuals = certify(outcome.count);
    const std::int64_t positive = write_multipliers(solved ? outcome.count : 0, answer.multipliers);
    const bool kept = write_perturbation(solved, answer.perturbation);
    if (block_.thread() != 0) return;
    // Squares that underflow prove nothing.
    const bool in_range = residuals.length > kSmallest || outcome.count == 0;
    const bool proven = kept && in_range && residuals.collinearity <= kTrustedCollinearity &&
                        residuals.primal * residuals.collinearity <= tolerance &&
                        residuals.primal <= tolerance && residuals.dual <= tolerance &&
                        residuals.gap <= tolerance;
    *answer.status = proven ? kStatusOptimal : kStatusIterationLimit;
    *answer.norm = residuals.length;
    *answer.iterations = outcome.iterations;
    *answer.active = positive;
    *answer.primal_residual = residuals.primal;
    *answer.dual_residual = residuals.dual;
    *answer.gap = residuals.gap;
  }

 private:
  struct Residuals {
    double length = 0;  // |s|
    double primal = kInfinity, dual = kInfinity, gap = kInfinity;
    double collinearity = kInfinity;  // (|s| + sum_j l_j |a_j|) / |s|: how much the sum cancels
  };

  // A violation of share e can shorten s by e times the collinearity. As in cpp/core, what the
  // rounding of residuals may hide is beyond this for the careful solver, which only the CPU has.
  static constexpr double kTrustedCollinearity = 1e5;
  static constexpr double kNoisy = 1e-13;      // as in cpp/core/certificate.cpp
  static constexpr double kSmallest = 1e-140;  // |s|
  static constexpr double kNormal = std::numeric_limits<double>::min();

  /// residual / size, infinite where a NaN or an overflow leaves nothing proven.
  TACEXT_DEVICE static double share_of(double residual, double size) {
    if (residual == 0 && size == 0) return 0;
    const double share = residual / size;
    return share >= 0 && size < kInfinity ? share : kInfinity;
  }

  TACEXT_DEVICE Residuals certify(std::int64_t count) {
    Residuals residuals;
    double squared = 0;
    for (std::int64_t d = block_.thread(); d < head_.latents; d += block_.threads())
      squared += slot_.perturbation[d] * slot_.perturbation[d];
    residuals.length = std::sqrt(block_.sum(squared));

    Choice worst{0.0, -1};  // max_j (m_j - a_j.s)+ / (|m_j| + |a_j| |s|)
    for (std::int64_t j = block_.thread(); j < head_.classes; j += block_.threads()) {
      if (j == target_) continue;
      double violation = margins_[j] - (products_[target_] - products_[j]);
      const double size =
          std::fabs(margins_[j]) + std::sqrt(slot_.squared_lengths[j]) * residuals.length;
      const double noise = head_.difference_noise(target_, j) * residuals.length;
      if (noise > kNoisy * size) violation += noise;  // it could hide that much
      if (violation <= 0) continue;
      const double share = share_of(violation, size);
      if (share > worst.value) worst = {share, j};
    }
    residuals.primal = block_.largest(worst).value;

    double value = 0, terms = 0;  // m.l and sum_j l_j |a_j|
    for (std::int64_t i = block_.thread(); i < count; i += block_.threads()) {
      value += margins_[slot_.active[i]] * slot_.multipliers[i];
      terms += slot_.multipliers[i] * std::sqrt(slot_.squared_lengths[slot_.active[i]]);
    }
    value = block_.sum(value);
    terms = block_.sum(terms) + residuals.length;
    double rest = 0, made = 0;  // |s - sum_j l_j a_j|^2 and |sum_j l_j a_j|^2
    for (std::int64_t d = block_.thread(); d < head_.latents; d += block_.threads()) {
      double sum = 0;  // last constraint first: not the order that made s
      for (std::int64_t i = count - 1; i >= 0; --i)
        sum += slot_.multipliers[i] * (head_.row(target_)[d] - head_.row(slot_.active[i])[d]);
      const double left = slot_.perturbation[d] - sum;
      rest += left * left;
      made += sum * sum;
    }
    rest = std::sqrt(block_.sum(rest));
    made = block_.sum(made);
    residuals.dual = share_of(rest, terms);
    residuals.collinearity = residuals.length > 0 ? terms / residuals.length : 1.0;

    const double energy = residuals.length * residuals.length, bound = 2 * value - made;
    const double size = energy > std::fabs(bound) ? energy : std::fabs(bound);
    residuals.gap = share_of(std::fabs(energy - bound), size);
    return residuals;
  }

  /// Undoes the scale. False where an entry that counts beside the largest one loses digits: what
  /// is stored is then not what was certified.
  TACEXT_DEVICE bool write_perturbation(bool solved, double* perturbation) {
    constexpr double kCounts = 1e-18;  // share of the largest
    Choice largest{0.0, -1};
    for (std::int64_t d = block_.thread(); solved && d < head_.latents; d += block_.threads()) {
      const Choice here{std::fabs(slot_.perturbation[d]), d};
      if (here.beats(largest)) largest = here;
    }
    const double counts = kCounts * block_.largest(largest).value;
    double lost = 0;
    for (std::int64_t d = block_.thread(); d < head_.latents; d += block_.threads()) {
      const double found = solved ? slot_.perturbation[d] : 0.0;
      const double stored = found * (scale_ != nullptr ? scale_[d] : 1.0);
      perturbation[d] = stored;
      const double size = std::fabs(stored);
      if (!(size < kInfinity) || (size < kNormal && std::fabs(found) > counts)) lost += 1;
    }
    return block_.sum(lost) == 0;
  }

  /// l over all classes, 0 where inactive; returns how many are positive.
  TACEXT_DEVICE std::int64_t write_multipliers(std::int64_t count, double* multipliers) {
    for (std::int64_t j = block_.thread(); j < head_.classes; j += block_.threads())
      multipliers[j] = 0;
    block_.barrier();
    double positive = 0;
    for (std::int64_t i = block_.thread(); i < count; i += block_.threads()) {
      multipliers[slot_.active[i]] = slot_.multipliers[i];
      positive += slot_.multipliers[i] > 0 ? 1.0 : 0.0;
    }
    return static_cast<std::int64_t>(block_.sum(positive));
  }

  Block& block_;
  const Head head_;
  const Slot slot_;
  const std::int64_t target_;
  const double* const margins_;
  const double* const products_;
  const double* const scale_;
};

}  // namespace tacext::cuda
