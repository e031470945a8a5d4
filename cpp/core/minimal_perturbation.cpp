#include "tacext/minimal_perturbation.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "balanced_for.h"
#include "certificate.h"
#include "closed_form.h"
#include "head_geometry.h"
#include "linear_algebra.h"
#include "orthogonal_active_set.h"
#include "priced_active_set.h"

namespace tacext {
namespace {

constexpr std::int64_t kBatch = 16;  // classes that share their matrix products
constexpr std::int64_t kLeastBatch = 8;
constexpr std::int64_t kSharedFrom = 400'000;   // count * C * D; less is done before a thread wakes
constexpr std::int64_t kClosedFormAlways = 64;  // up to here its factor costs nothing
constexpr std::int64_t kClosedFormLargest = 2048;
constexpr std::int64_t kClosedFormProbes = 4;
constexpr int kNearOne = 32;  // margins up to 2^32 or above 2^-32 need no other unit
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

/// values * 2^exponent; false where what they lose by it is more than rounding.
bool store(const std::vector<double>& values, int exponent, double* to) {
  if (exponent == 0) {
    std::copy(values.begin(), values.end(), to);
    return true;
  }
  const auto count = static_cast<std::int64_t>(values.size());
  multiply_by_power_of_two(values.data(), count, exponent, to);
  const double largest = largest_magnitude(values.data(), count);
  const double stored = largest_magnitude(to, count);
  // What underflows is below 2^-1074.
  return largest == 0 || (stored > std::ldexp(1.0, -1000) && stored < HUGE_VAL);
}

class Solver {
 public:
  Solver(const PerturbationProblem& problem, const SolverSettings& settings,
         const ParallelFor& parallel_for)
      : problem_(problem), settings_(settings), head_(problem, parallel_for) {
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
      if (candidate.status == Status::kIterationLimit ||
          candidate.collinearity > kTrustedCollinearity) {
        const std::int64_t before = candidate.iterations;
        Candidate careful = solve_carefully(batch[i - begin], settings_.max_iterations - before);
        const std::int64_t all = before + careful.iterations;
        // Its residuals are the stricter ones, so what it proves or doubts is the last word; where
        // neither is proven, the one closer to it is kept.
        if (careful.status != Status::kIterationLimit ||
            candidate.status != Status::kIterationLimit ||
            careful.worst_residual() < candidate.worst_residual())
          candidate = std::move(careful);
        candidate.iterations = all;
      }
      write(candidate, batch[i - begin].margins.exponent, i, result);
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
    if (std::abs(margins.exponent) <= kNearOne) margins.exponent = 0;
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

  /// Its multipliers are a ray, scaled to sum 1.
  static void mark_unreachable(Candidate& candidate) {
    candidate.status = Status::kUnreachable;
    candidate.ray = true;
    double sum = 0;
    for (double l : candidate.multipliers) sum += l;
    for (double& l : candidate.multipliers) l /= sum;
    for (double& value : candidate.perturbation) value /= sum;
  }

  // ---- the careful way: from W itself instead of K, certified constraint by constraint ----

  Candidate solve_carefully(const Pending& p, std::int64_t max_iterations) const {
    const std::int64_t k = p.target;
    const std::vector<double> lengths = squared_lengths(k);
    const double* const margins = p.margins.values.data();
    OrthogonalActiveSet method(head_, k, margins, lengths);
    const Ending ending = method.solve(max_iterations);
    Candidate candidate;
    adopt(method, candidate);
    if (ending == Ending::kUnreachable) mark_unreachable(candidate);
    if (ending == Ending::kSolved) polish(method, p, candidate);
    std::vector<double> products, sizes;
    for (std::int64_t j = 0; j < problem_.classes; ++j) {
      products.push_back(head_.constraint_dot(k, j, candidate.perturbation.data()));
      sizes.push_back(head_.constraint_dot_size(k, j, candidate.perturbation.data()));
    }
    certify(head_, k, margins, lengths, products.data(), sizes.data(), settings_.tolerance,
            candidate);
    return candidate;
  }

  std::vector<double> squared_lengths(std::int64_t k) const {
    if (head_.has_gram()) return head_.squared_lengths(k, head_.gram_row(k));
    const std::vector<double> row(head_.row(k), head_.row(k) + problem_.latents);
    return head_.squared_lengths(k, multiply(row, 1).data());
  }

  void polish(const OrthogonalActiveSet& method, const Pending& p, Candidate& candidate) const {
    const std::vector<std::int64_t>& active = method.set().active;
    std::fill(candidate.perturbation.begin(), candidate.perturbation.end(), 0.0);
    std::fill(candidate.multipliers.begin(), candidate.multipliers.end(), 0.0);
    refine(p, active, candidate, [&](std::vector<double> residual) {
      method.add_step(residual, candidate.perturbation);
      method.solve(residual);
      for (std::size_t i = 0; i < active.size(); ++i)
        candidate.multipliers[active[i]] =
            std::max(0.0, candidate.multipliers[active[i]] + residual[i]);
    });
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

  /// Undoes the powers of two: with rows of W diag(scale) 2^-e and margins 2^-f that were solved
  /// for, s is 2^(f - e) and l is 2^(f - 2 e) times what was found.
  void write(const Candidate& found, int margin_exponent, std::int64_t i,
             const PerturbationResult& result) const {
    Status status = found.status;
    double primal = found.primal;
    double* const s = result.perturbation + i * problem_.latents;
    double* const l = result.multipliers + i * problem_.classes;
    const int exponent = margin_exponent - head_.exponent();
    double length = norm(found.perturbation);
    if (found.ray) {  // of sum 1, so that only m.l has a unit
      std::copy(found.multipliers.begin(), found.multipliers.end(), l);
      length = status == Status::kUnreachable ? std::numeric_limits<double>::infinity()
                                              : std::numeric_limits<double>::quiet_NaN();
    } else {
      const bool stored = store(found.perturbation, exponent, s) &&
                          store(found.multipliers, exponent - head_.exponent(), l);
      length = std::ldexp(length, exponent);
      if (!stored && status == Status::kOptimal) {  // what is stored is not what was certified
        status = Status::kIterationLimit;
        primal = std::numeric_limits<double>::infinity();
      }
      if (status == Status::kIterationLimit && !(length > 0 && std::isfinite(length)))
        length = std::numeric_limits<double>::quiet_NaN();  // nothing was found
    }
    const bool answer = std::isfinite(length);
    for (std::int64_t d = 0; d < problem_.latents; ++d)
      s[d] = answer ? s[d] * (problem_.scale ? problem_.scale[d] : 1.0)
                    : std::numeric_limits<double>::quiet_NaN();
    result.norm[i] = length;
    result.status[i] = static_cast<std::int32_t>(status);
    result.iterations[i] = found.iterations;
    result.active[i] = std::count_if(l, l + problem_.classes, [](double x) { return x > 0; });
    result.primal_residual[i] = primal;
    result.dual_residual[i] = found.dual;
    result.gap[i] = found.ray ? std::ldexp(found.gap, margin_exponent) : found.gap;
  }

  PerturbationProblem problem_;
  SolverSettings settings_;
  HeadGeometry head_;
  std::unique_ptr<ClosedForm> closed_form_;
};

}  // namespace

void minimal_perturbation(const PerturbationProblem& problem, const SolverSettings& settings,
                          const PerturbationResult& result, const ParallelFor& parallel_for) {
  if ((problem.margins == nullptr) == (problem.margins_single == nullptr))
    throw std::invalid_argument("minimal_perturbation: margins: expected either double or float");
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
