#include "tacext/minimal_perturbation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "balanced_for.h"
#include "careful_solution.h"
#include "certificate.h"
#include "closed_form.h"
#include "head_geometry.h"
#include "linear_algebra.h"
#include "priced_active_set.h"
#include "result_writer.h"

namespace tacext {
namespace {

constexpr std::int64_t kBatch = 16;  // classes that share their matrix products
constexpr std::int64_t kLeastBatch = 8;
constexpr std::int64_t kSharedFrom = 400'000;   // count * C * D; less is done before a thread wakes
constexpr std::int64_t kClosedFormAlways = 64;  // up to here its factor costs nothing
constexpr std::int64_t kClosedFormLargest = 2048;
constexpr std::int64_t kClosedFormProbes = 4;
// A violation of share e can shorten s by e times the collinearity. The rounding of the fast way's
// residuals can hide shares of some 1e-14, beyond this more than 1e-9 of the norm.
constexpr double kTrustedCollinearity = 1e5;

/// Non-negative to rounding; what is below zero by rounding is set to zero. False with a NaN.
bool make_non_negative(std::vector<double>& multipliers) {
  const double least =
      -1e-13 * largest_magnitude(multipliers.data(), static_cast<std::int64_t>(multipliers.size()));
  for (const double l : multipliers)
    if (!(l >= least)) return false;
  for (double& l : multipliers) l = std::max(l, 0.0);
  return true;
}

/// Row k of M, divided by 2^exponent so that s.s stays within the range of a double.
struct Margins {
  std::vector<double> values;
  int exponent = 0;
};

/// One class of a batch on its way to an answer.
struct Pending {
  std::int64_t target;
  Margins margins;
  std::unique_ptr<PricedActiveSet> method;  // null before, after and where the closed form serves
  bool by_closed_form = false;
  bool certified = false;
  Candidate candidate;
};

class Solver {
 public:
  Solver(const PerturbationProblem& problem, const SolverSettings& settings,
         const ParallelFor& parallel_for)
      : problem_(problem),
        settings_(settings),
        head_(problem, parallel_for),
        writer_(problem, head_.exponent()) {
    if (settings_.max_iterations <= 0) settings_.max_iterations = 50 * problem.classes + 100;
    if (settings_.closed_form && head_.has_gram()) closed_form_ = probe_closed_form();
  }

  /// Solves, certifies and writes rows [begin, end) of the result, at most kBatch of them.
  void solve_rows(std::int64_t begin, std::int64_t end, const PerturbationResult& result) const {
    std::vector<Pending> batch;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t k = problem_.targets ? problem_.targets[i] : i;
      batch.push_back({k, margins(k), nullptr, false, false, {}});
    }
    solve_fast(batch);
    for (std::int64_t i = begin; i < end; ++i) {
      Candidate& candidate = batch[i - begin].candidate;
      if (is_doubtful(candidate)) settle_carefully(batch[i - begin]);
      writer_.write(candidate, batch[i - begin].margins.exponent, i, result);
    }
  }

 private:
  Margins margins(std::int64_t k) const {
    const std::int64_t classes = problem_.classes;
    Margins margins;
    if (const float* const single = problem_.margins_single; single != nullptr)
      margins.values.assign(single + k * classes, single + (k + 1) * classes);
    else
      margins.values.assign(problem_.margins + k * classes, problem_.margins + (k + 1) * classes);
    std::vector<double>& m = margins.values;
    m[k] = 0;
    // The largest one decides how long s is, however far below zero others are.
    const double largest = *std::max_element(m.begin(), m.end());
    if (largest > 0) margins.exponent = std::ilogb(largest);
    if (margins.exponent != 0)
      multiply_by_power_of_two(m.data(), classes, -margins.exponent, m.data());
    return margins;
  }

  /// The closed form pays where most constraints are active. Whether they are is asked of the first
  /// few classes of the head, not of the list: a class's bits must not depend on the list.
  std::unique_ptr<ClosedForm> probe_closed_form() const {
    if (problem_.classes <= kClosedFormAlways) return ClosedForm::make(head_);
    if (problem_.classes > kClosedFormLargest) return nullptr;
    for (std::int64_t k = 0; k < kClosedFormProbes; ++k) {
      const Margins wanted = margins(k);
      PricedActiveSet method(head_, k, wanted.values.data(), head_.gram_row(k),
                             settings_.max_iterations);
      method.solve();
      if (static_cast<std::int64_t>(method.set().active.size()) == problem_.classes - 1)
        return ClosedForm::make(head_);
    }
    return nullptr;
  }

  // ---- the fast way: from K, by the closed form or by rounds of the active-set method ----

  void solve_fast(std::vector<Pending>& batch) const {
    const std::vector<double> gram_rows = head_.has_gram() ? std::vector<double>() : gram_of(batch);
    for (std::size_t i = 0; i < batch.size(); ++i) {
      Pending& p = batch[i];
      if (try_closed_form(p)) continue;
      const double* const row =
          head_.has_gram() ? head_.gram_row(p.target) : gram_rows.data() + i * problem_.classes;
      p.method = std::make_unique<PricedActiveSet>(head_, p.target, p.margins.values.data(), row,
                                                   settings_.max_iterations);
      p.method->solve();
      adopt(*p.method, p.candidate);
    }
    // Every class is checked with products of W itself, a matrix product for all that are open.
    // Those of the check that finds nothing left to do serve the certificate.
    for (std::vector<Pending*> open = open_of(batch); !open.empty(); open = open_of(batch)) {
      const std::vector<double> products = products_of(open);
      for (std::size_t i = 0; i < open.size(); ++i)
        check(*open[i], products.data() + i * problem_.classes);
    }
  }

  void check(Pending& p, const double* products) const {
    std::vector<double> lengths;
    if (p.by_closed_form) {
      lengths = head_.squared_lengths(p.target, head_.gram_row(p.target));
    } else {
      if (!p.method->check(products)) {
        adopt(*p.method, p.candidate);
        return;
      }
      if (p.method->ending() == Ending::kUnreachable) mark_unreachable(p.candidate);
      lengths = p.method->squared_lengths();
      p.method.reset();
    }
    p.certified = true;
    certify(head_, p.target, p.margins.values.data(), lengths, products, settings_.tolerance,
            p.candidate);
  }

  static std::vector<Pending*> open_of(std::vector<Pending>& batch) {
    std::vector<Pending*> open;
    for (Pending& p : batch)
      if (!p.certified) open.push_back(&p);
    return open;
  }

  /// w_j . s of each class's s and all j, [open, classes].
  std::vector<double> products_of(const std::vector<Pending*>& open) const {
    std::vector<double> rows;
    for (const Pending* p : open)
      rows.insert(rows.end(), p->candidate.perturbation.begin(), p->candidate.perturbation.end());
    return multiply(rows, open.size());
  }

  /// Rows of K for the classes of a batch.
  std::vector<double> gram_of(const std::vector<Pending>& batch) const {
    std::vector<double> rows;
    for (const Pending& p : batch)
      rows.insert(rows.end(), head_.row(p.target), head_.row(p.target) + problem_.latents);
    return multiply(rows, batch.size());
  }

  std::vector<double> multiply(const std::vector<double>& rows, std::size_t count) const {
    std::vector<double> products(count * static_cast<std::size_t>(problem_.classes));
    head_.packed().multiply(rows.data(), static_cast<std::int64_t>(count), problem_.classes,
                            products.data(), problem_.classes);
    return products;
  }

  bool try_closed_form(Pending& p) const {
    if (closed_form_ == nullptr) return false;
    std::vector<double> multipliers = closed_form_->multipliers(p.target, p.margins.values.data());
    if (!make_non_negative(multipliers)) return false;
    std::vector<std::int64_t> active;
    std::vector<double> values;
    for (std::int64_t j = 0; j < problem_.classes; ++j)
      if (j != p.target) {
        active.push_back(j);
        values.push_back(multipliers[j]);
      }
    Candidate& candidate = p.candidate;
    candidate.perturbation = combine_constraints(head_, p.target, active, values);
    refine(p, active, candidate, [&](const std::vector<double>& residual) {
      const std::vector<double> wanted = spread(active, residual, problem_.classes);
      const std::vector<double> step = closed_form_->multipliers(p.target, wanted.data());
      for (std::size_t i = 0; i < active.size(); ++i)
        values[i] = std::max(0.0, values[i] + step[active[i]]);
      candidate.perturbation = combine_constraints(head_, p.target, active, values);
    });
    candidate.multipliers = spread(active, values, problem_.classes);
    p.by_closed_form = true;
    return true;
  }

  template <class Method>
  void adopt(const Method& method, Candidate& candidate) const {
    const ActiveSet& set = method.set();
    candidate.iterations = set.iterations;
    candidate.multipliers = spread(set.active, set.multipliers, problem_.classes);
    candidate.perturbation =
        combine_constraints(head_, method.target(), set.active, set.multipliers);
  }

  /// Iterative refinement of the active constraints, with residuals taken from W itself.
  template <class Correct>
  void refine(const Pending& p, const std::vector<std::int64_t>& active, Candidate& candidate,
              const Correct& correct) const {
    constexpr int kRounds = 4;
    double before = std::numeric_limits<double>::infinity();
    for (int round = 0; round < kRounds; ++round) {
      std::vector<double> residual(active.size());
      double worst = 0, size = 0;
      for (std::size_t i = 0; i < active.size(); ++i) {
        const double wanted = p.margins.values[active[i]];
        residual[i] =
            wanted - head_.constraint_dot(p.target, active[i], candidate.perturbation.data());
        worst = std::max(worst, std::fabs(residual[i]));
        size = std::max(size, std::fabs(wanted));
      }
      if (worst <= 1e-15 * size || worst > 0.5 * before) return;  // done, or at its limit
      before = worst;
      correct(residual);
    }
  }

  // ---- the careful way ----

  bool is_doubtful(const Candidate& candidate) const {
    return candidate.status == Status::kIterationLimit ||
           candidate.collinearity > kTrustedCollinearity ||
           candidate.collinearity * candidate.primal > settings_.tolerance;
  }

  /// What the careful way proves is the last word. Where it proves nothing, be it for want of
  /// steps, the better answer is kept, but not as proven.
  void settle_carefully(Pending& p) const {
    Candidate& fast = p.candidate;
    const std::int64_t before = fast.iterations;
    Candidate careful =
        solve_carefully(head_, p.target, p.margins.values.data(), squared_lengths(p.target),
                        settings_.tolerance, settings_.max_iterations - before);
    const std::int64_t all = before + careful.iterations;
    const bool proven = careful.status != Status::kIterationLimit;
    if (!proven && fast.status == Status::kOptimal) {
      fast.status = Status::kIterationLimit;
      fast.primal = std::numeric_limits<double>::infinity();
    } else if (proven || careful.worst_residual() < fast.worst_residual()) {
      fast = std::move(careful);
    }
    fast.iterations = all;
  }

  std::vector<double> squared_lengths(std::int64_t k) const {
    if (head_.has_gram()) return head_.squared_lengths(k, head_.gram_row(k));
    const std::vector<double> row(head_.row(k), head_.row(k) + problem_.latents);
    return head_.squared_lengths(k, multiply(row, 1).data());
  }

  PerturbationProblem problem_;
  SolverSettings settings_;
  HeadGeometry head_;
  ResultWriter writer_;
  std::unique_ptr<ClosedForm> closed_form_;
};

}  // namespace

void minimal_perturbation(const PerturbationProblem& problem, const SolverSettings& settings,
                          const PerturbationResult& result, const ParallelFor& parallel_for) {
  if ((problem.margins == nullptr) == (problem.margins_single == nullptr))
    throw std::invalid_argument("minimal_perturbation: margins: expected either double or float");
  if (problem.classes < 2 || problem.latents < 1)
    throw std::invalid_argument("minimal_perturbation: weight: expected 2 classes and 1 latent");
  if (!(settings.tolerance > 0 && settings.tolerance < 1))
    throw std::invalid_argument("minimal_perturbation: tolerance: expected between 0 and 1");
  const Solver solver(problem, settings, parallel_for);
  // Short lists in smaller batches, for the threads to share.
  const std::int64_t size = std::clamp(problem.count / kBatch, kLeastBatch, kBatch);
  const bool shared = problem.count * problem.classes * problem.latents >= kSharedFrom;
  const ParallelFor& loop = shared ? parallel_for : ParallelFor(serial_for);
  balanced_for((problem.count + size - 1) / size, loop, [&](std::int64_t b) {
    solver.solve_rows(b * size, std::min((b + 1) * size, problem.count), result);
  });
}

}  // namespace tacext
