#include "tacext/minimal_perturbation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "active_set.h"
#include "certificate.h"
#include "closed_form.h"
#include "head_geometry.h"

namespace tacext {
namespace {

constexpr std::int64_t kBatch = 16;             // classes certified by one matrix product
constexpr std::int64_t kClosedFormAlways = 64;  // up to here its factor costs nothing
constexpr std::int64_t kClosedFormLargest = 2048;
constexpr std::int64_t kClosedFormProbes = 4;
// Beyond this the normwise residuals of the fast path no longer bound the norm to 1e-9.
constexpr double kTrustedCollinearity = 1e5;

/// Non-negative to rounding; what is below zero by rounding is set to zero.
bool make_non_negative(std::vector<double>& multipliers) {
  const auto [low, high] = std::minmax_element(multipliers.begin(), multipliers.end());
  if (*low < -1e-13 * *high) return false;
  for (double& l : multipliers) l = std::max(l, 0.0);
  return true;
}

/// active_i -> values_i over all classes, 0 elsewhere.
std::vector<double> spread(const std::vector<std::int64_t>& active,
                           const std::vector<double>& values, std::int64_t classes) {
  std::vector<double> all(static_cast<std::size_t>(classes), 0.0);
  for (std::size_t i = 0; i < active.size(); ++i) all[active[i]] = values[i];
  return all;
}

class Solver {
 public:
  Solver(const PerturbationProblem& problem, const SolverSettings& settings,
         const ParallelFor& parallel_for)
      : problem_(problem), settings_(settings), head_(problem, parallel_for) {
    if (settings_.max_iterations <= 0) settings_.max_iterations = 50 * problem.classes + 100;
    if (settings_.closed_form) closed_form_ = probe_closed_form();
  }

  /// Solves, certifies and writes rows [begin, end) of the result, at most kBatch of them.
  void solve_rows(std::int64_t begin, std::int64_t end, const PerturbationResult& result) const {
    std::vector<std::int64_t> classes;
    std::vector<Candidate> candidates;
    for (std::int64_t i = begin; i < end; ++i) {
      classes.push_back(problem_.targets ? problem_.targets[i] : i);
      candidates.push_back(solve_fast(classes.back()));
    }
    certify(head_, classes, problem_.margins, settings_.tolerance, candidates);
    for (std::int64_t i = begin; i < end; ++i) {
      Candidate& candidate = candidates[i - begin];
      if (candidate.status == Status::kIterationLimit ||
          candidate.collinearity > kTrustedCollinearity) {
        Candidate careful = solve_carefully(classes[i - begin]);
        // Its residuals are the stricter ones, so what it proves or doubts is the last word; where
        // neither is proven, the one closer to it is kept.
        if (careful.status != Status::kIterationLimit ||
            candidate.status != Status::kIterationLimit ||
            careful.worst_residual() < candidate.worst_residual())
          candidate = std::move(careful);
      }
      write(candidate, i, result);
    }
  }

 private:
  const double* margins(std::int64_t k) const { return problem_.margins + k * problem_.classes; }

  /// The closed form pays where most constraints are active. On a large head that is asked of the
  /// first few classes of the head, not of the list: a class's bits must not depend on the list.
  std::unique_ptr<ClosedForm> probe_closed_form() const {
    if (problem_.classes > kClosedFormLargest) return nullptr;
    std::unique_ptr<ClosedForm> form = ClosedForm::make(head_);
    if (form == nullptr || problem_.classes <= kClosedFormAlways) return form;
    for (std::int64_t k = 0; k < kClosedFormProbes; ++k) {
      std::vector<double> multipliers = form->multipliers(k, margins(k));
      if (make_non_negative(multipliers)) return form;
    }
    return nullptr;
  }

  // ---- the three ways to an answer ----

  Candidate solve_fast(std::int64_t k) const {
    if (closed_form_ != nullptr) {
      Candidate candidate;
      candidate.multipliers = closed_form_->multipliers(k, margins(k));
      if (make_non_negative(candidate.multipliers)) {
        polish_all_active(k, candidate);
        return candidate;
      }
    }
    GramFactor factor(head_, k);
    return run_active_set(factor, k);
  }

  /// From W itself instead of K, and certified constraint by constraint.
  Candidate solve_carefully(std::int64_t k) const {
    OrthogonalFactor factor(head_, k);
    Candidate candidate = run_active_set(factor, k);
    const double* const s = candidate.perturbation.data();
    std::vector<double> products(static_cast<std::size_t>(problem_.classes));
    std::vector<double> sizes(products.size());
    for (std::int64_t j = 0; j < problem_.classes; ++j) {
      products[j] = head_.constraint_dot(k, j, s);
      sizes[j] = head_.constraint_dot_size(k, j, s);
    }
    certify(head_, k, margins(k), products.data(), sizes.data(), settings_.tolerance, candidate);
    return candidate;
  }

  template <class Factor>
  Candidate run_active_set(Factor& factor, std::int64_t k) const {
    const ActiveSetSolution solution =
        solve_active_set(factor, margins(k), head_.squared_norms(k), k, settings_.max_iterations);
    Candidate candidate;
    candidate.iterations = solution.iterations;
    candidate.multipliers = spread(solution.active, solution.multipliers, problem_.classes);
    if (solution.ending == Ending::kUnreachable) {
      double sum = 0;
      for (double l : candidate.multipliers) sum += l;
      for (double& l : candidate.multipliers) l /= sum;
      candidate.status = Status::kUnreachable;
      candidate.perturbation = combine_constraints(head_, k, candidate.multipliers);
    } else {
      candidate.perturbation = combine_constraints(head_, k, candidate.multipliers);
      if (solution.ending == Ending::kSolved) polish(factor, k, solution.active, candidate);
    }
    return candidate;
  }

  // ---- iterative refinement of the active constraints, with residuals taken from W itself ----

  void polish_all_active(std::int64_t k, Candidate& candidate) const {
    std::vector<std::int64_t> active;
    for (std::int64_t j = 0; j < problem_.classes; ++j)
      if (j != k) active.push_back(j);
    candidate.perturbation = combine_constraints(head_, k, candidate.multipliers);
    refine(k, active, candidate, [&](const std::vector<double>& residual) {
      const std::vector<double> wanted = spread(active, residual, problem_.classes);
      add_multipliers(closed_form_->multipliers(k, wanted.data()), candidate);
      candidate.perturbation = combine_constraints(head_, k, candidate.multipliers);
    });
  }

  void polish(const GramFactor& factor, std::int64_t k, const std::vector<std::int64_t>& active,
              Candidate& candidate) const {
    refine(k, active, candidate, [&](std::vector<double> residual) {
      factor.solve(residual);
      add_multipliers(spread(active, residual, problem_.classes), candidate);
      candidate.perturbation = combine_constraints(head_, k, candidate.multipliers);
    });
  }

  void polish(const OrthogonalFactor& factor, std::int64_t k,
              const std::vector<std::int64_t>& active, Candidate& candidate) const {
    std::fill(candidate.perturbation.begin(), candidate.perturbation.end(), 0.0);
    std::fill(candidate.multipliers.begin(), candidate.multipliers.end(), 0.0);
    refine(k, active, candidate, [&](std::vector<double> residual) {
      factor.add_step(residual, candidate.perturbation);
      factor.solve(residual);
      add_multipliers(spread(active, residual, problem_.classes), candidate);
    });
  }

  static void add_multipliers(const std::vector<double>& step, Candidate& candidate) {
    for (std::size_t j = 0; j < step.size(); ++j)
      candidate.multipliers[j] = std::max(0.0, candidate.multipliers[j] + step[j]);
  }

  template <class Correct>
  void refine(std::int64_t k, const std::vector<std::int64_t>& active, Candidate& candidate,
              const Correct& correct) const {
    constexpr int kRounds = 4;
    double before = std::numeric_limits<double>::infinity();
    for (int round = 0; round < kRounds; ++round) {
      std::vector<double> residual(active.size());
      double worst = 0, size = 0;
      for (std::size_t i = 0; i < active.size(); ++i) {
        const double wanted = margins(k)[active[i]];
        residual[i] = wanted - head_.constraint_dot(k, active[i], candidate.perturbation.data());
        worst = std::max(worst, std::fabs(residual[i]));
        size = std::max(size, std::fabs(wanted));
      }
      if (worst <= 1e-15 * size || worst > 0.5 * before) return;  // done, or at its limit
      before = worst;
      correct(residual);
    }
  }

  void write(const Candidate& candidate, std::int64_t i, const PerturbationResult& result) const {
    const bool unreachable = candidate.status == Status::kUnreachable;
    double* const s = result.perturbation + i * problem_.latents;
    for (std::int64_t d = 0; d < problem_.latents; ++d) {
      const double scale = problem_.scale ? problem_.scale[d] : 1.0;
      s[d] = unreachable ? std::numeric_limits<double>::quiet_NaN()
                         : candidate.perturbation[d] * scale;
    }
    result.norm[i] =
        unreachable ? std::numeric_limits<double>::infinity() : norm(candidate.perturbation);
    std::copy(candidate.multipliers.begin(), candidate.multipliers.end(),
              result.multipliers + i * problem_.classes);
    result.status[i] = static_cast<std::int32_t>(candidate.status);
    result.iterations[i] = candidate.iterations;
    result.active[i] = std::count_if(candidate.multipliers.begin(), candidate.multipliers.end(),
                                     [](double l) { return l > 0; });
    result.primal_residual[i] = candidate.primal;
    result.dual_residual[i] = candidate.dual;
    result.gap[i] = candidate.gap;
  }

  PerturbationProblem problem_;
  SolverSettings settings_;
  HeadGeometry head_;
  std::unique_ptr<ClosedForm> closed_form_;
};

}  // namespace

void minimal_perturbation(const PerturbationProblem& problem, const SolverSettings& settings,
                          const PerturbationResult& result, const ParallelFor& parallel_for) {
  const Solver solver(problem, settings, parallel_for);
  const std::int64_t batches = (problem.count + kBatch - 1) / kBatch;
  parallel_for(batches, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b)
      solver.solve_rows(b * kBatch, std::min((b + 1) * kBatch, problem.count), result);
  });
}

}  // namespace tacext
