#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define TACEXT_DEVICE __device__
#else
#define TACEXT_DEVICE
#endif

// The dual active-set method of cpp/core/active_set.h from the Gram matrix, for one block of
// threads and one class. The same source runs on the host with a block of one thread: nothing here
// knows CUDA. All that is shared between threads goes through the Block policy:
//
//   thread(), threads()          this thread among those of the block
//   group(), groups()            its group (a warp) among those of the block
//   lane(), lanes()              this thread within its group
//   barrier()                    all threads arrive; what any of them wrote is then seen by all
//   sum(x), largest(Choice)      over the block, the same bits in every thread
//   group_sum(x)                 over the group, the same bits in every lane
//
// sum and largest are barriers too. Scalars are the same in all threads of the block, so all take
// the same branches; vectors lie in the class's workspace, each thread working on every
// threads()-th entry.
namespace tacext::cuda {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

/// A value and where it was found; of equal values the one with the smaller index wins.
struct Choice {
  double value = -kInfinity;
  std::int64_t index = -1;

  TACEXT_DEVICE bool beats(const Choice& other) const {
    return value > other.value ||
           (value == other.value && index >= 0 && (other.index < 0 || index < other.index));
  }
};

/// The scaled rows of W, centred, and K = W W^T.
struct Head {
  const double* rows;
  const double* gram;
  std::int64_t classes, latents;

  TACEXT_DEVICE const double* row(std::int64_t j) const { return rows + j * latents; }
  TACEXT_DEVICE const double* gram_row(std::int64_t j) const { return gram + j * classes; }

  /// How far w_k . x - w_j . x can be from a_j . x, in units of |x|; as in
  /// cpp/core/head_geometry.h.
  TACEXT_DEVICE double difference_noise(std::int64_t k, std::int64_t j) const {
    return 0.5 * kEpsilon * (8 + static_cast<double>(latents)) *
           (std::sqrt(gram_row(k)[k]) + std::sqrt(gram_row(j)[j]));
  }
};

/// One class's workspace; `capacity` bounds the active set.
struct Slot {
  std::int64_t capacity;
  double* slack;            // m_j - a_j . s, [classes]
  double* squared_lengths;  // |a_j|^2, [classes]
  double* perturbation;     // s, [latents]
  double* factor;           // L of A A^T = L L^T, rows packed, [capacity (capacity + 1) / 2]
  double* projection;       // [capacity], as the next three
  double* coefficients;
  double* multipliers;
  double* residual;
  std::int64_t* active;  // [capacity]
};

enum class Ending : std::int32_t { kSolved, kUnsolved };

/// What the solve leaves for the certificate.
struct Outcome {
  Ending ending = Ending::kUnsolved;
  std::int64_t count = 0;  // active constraints
  std::int64_t iterations = 0;
};

template <class Block>
class ActiveSetSolver {
 public:
  /// margins is row `target` of M.
  TACEXT_DEVICE ActiveSetSolver(Block& block, const Head& head, const Slot& slot,
                                std::int64_t target, const double* margins)
      : block_(block), head_(head), slot_(slot), target_(target), margins_(margins) {}

  /// From the empty set to the solution, refined against W. Ends unsolved where the CPU must
  /// decide: too many active constraints or steps, or no way to satisfy a constraint.
  TACEXT_DEVICE Outcome solve(std::int64_t max_iterations) {
    squared_lengths();
    for (std::int64_t j = first(); j < head_.classes; j += step()) slot_.slack[j] = margins_[j];
    block_.barrier();
    while (outcome_.ending == Ending::kUnsolved) {
      const Choice violated = most_violated();
      if (violated.index < 0) {  // primal feasible; dual feasible and complementary all along
        refine();
        outcome_.ending = Ending::kSolved;
      } else if (!satisfy(violated, max_iterations)) {
        break;
      }
    }
    return outcome_;
  }

 private:
  static constexpr double kDependent = 1e-12;  // as CandidateBlock::kDependent

  TACEXT_DEVICE std::int64_t first() const { return block_.thread(); }
  TACEXT_DEVICE std::int64_t step() const { return block_.threads(); }

  // ---- geometry ----

  /// |a_j|^2 from K, or from W where K's differences cancel.
  TACEXT_DEVICE void squared_lengths() {
    constexpr double kCancelled = 1e-6;
    const double* const target = head_.gram_row(target_);
    for (std::int64_t j = block_.group(); j < head_.classes; j += block_.groups()) {
      const double own = head_.gram_row(j)[j];
      double norm = target[target_] - 2 * target[j] + own;
      if (norm < kCancelled * (target[target_] + own)) {
        norm = 0;
        for (std::int64_t d = block_.lane(); d < head_.latents; d += block_.lanes()) {
          const double difference = head_.row(target_)[d] - head_.row(j)[d];
          norm += difference * difference;
        }
        norm = block_.group_sum(norm);
      }
      if (block_.lane() == 0) slot_.squared_lengths[j] = norm;
    }
  }

  /// The constraint furthest (in distance) from holding; none where all hold to rounding. One that
  /// no s can change, 0 . s >= m > 0, is infinitely far.
  TACEXT_DEVICE Choice most_violated() {
    constexpr double kRounding = 1e-13;
    double energy = 0;  // s.s = l.G l = l.m on the active set
    for (std::int64_t i = first(); i < outcome_.count; i += step())
      energy += slot_.multipliers[i] * margins_[slot_.active[i]];
    energy = block_.sum(energy);
    const double norm = energy > 0 ? std::sqrt(energy) : 0.0;
    Choice worst{0.0, -1};
    for (std::int64_t j = first(); j < head_.classes; j += step()) {
      const double slack = slot_.slack[j];
      if (j == target_ || slack <= 0) continue;
      const double length = std::sqrt(slot_.squared_lengths[j]);
      double distance = slack / length;
      if (length == 0)
        distance = margins_[j] > 0 ? kInfinity : 0.0;
      else if (slack <= kRounding * (std::fabs(margins_[j]) + length * norm))
        distance = 0;
      if (distance > worst.value) worst = {distance, j};
    }
    return block_.largest(worst);
  }

  // ---- one constraint enters, and others may leave for it ----

  /// False where the CPU must decide.
  TACEXT_DEVICE bool satisfy(const Choice& violated, std::int64_t max_iterations) {
    const std::int64_t p = violated.index;
    if (violated.value == kInfinity) return false;
    double multiplier = 0;
    for (;;) {
      if (outcome_.iterations == max_iterations) return false;
      ++outcome_.iterations;
      const double curvature = project(p);
      // Negated, so that a NaN, of a K that overflowed, takes no step and removes no constraint -1.
      const bool dependent = !(curvature > kDependent * slot_.squared_lengths[p]);
      const Choice blocking = first_blocking();
      if (dependent && blocking.index < 0) return false;  // a Farkas ray, for the CPU to prove

      // Along z the candidate becomes active after a full step; a multiplier may hit zero before.
      const double full_step = dependent ? kInfinity : slot_.slack[p] / curvature;
      const double blocking_step = -blocking.value;
      const double length = full_step <= blocking_step ? full_step : blocking_step;
      // Overflowed: no step, and no constraint -1 to remove.
      if (!(std::fabs(length) < kInfinity) || !(full_step <= kInfinity)) return false;
      for (std::int64_t i = first(); i < outcome_.count; i += step()) {
        const double moved = slot_.multipliers[i] - length * slot_.coefficients[i];
        slot_.multipliers[i] = moved > 0 ? moved : 0.0;
      }
      multiplier += length;
      block_.barrier();  // remove() reads multipliers that other threads wrote
      if (!dependent && length > 0) move_slack(p, length);
      if (full_step <= blocking_step) return add(p, curvature, multiplier);
      remove(blocking.index);
    }
  }

  /// Splits a_p = sum_i coefficients[i] a_active[i] + z and returns |z|^2.
  TACEXT_DEVICE double project(std::int64_t p) {
    const double* const k_row = head_.gram_row(target_);
    const double* const p_row = head_.gram_row(p);
    for (std::int64_t i = first(); i < outcome_.count; i += step()) {
      const std::int64_t j = slot_.active[i];  // G[j, p] = K[k,k] - K[k,j] - K[k,p] + K[j,p]
      slot_.projection[i] = (k_row[target_] - k_row[j]) - (k_row[p] - p_row[j]);
    }
    block_.barrier();
    solve_lower(slot_.projection);
    double squared = 0;
    for (std::int64_t i = first(); i < outcome_.count; i += step()) {
      squared += slot_.projection[i] * slot_.projection[i];
      slot_.coefficients[i] = slot_.projection[i];
    }
    squared = block_.sum(squared);
    solve_upper(slot_.coefficients);
    return slot_.squared_lengths[p] - squared;
  }

  /// How far the multipliers can move along -coefficients before one of them reaches zero, negated.
  TACEXT_DEVICE Choice first_blocking() {
    constexpr double kRounding = 1e-12;
    Choice largest{0.0, -1};
    for (std::int64_t i = first(); i < outcome_.count; i += step()) {
      const double size = std::fabs(slot_.coefficients[i]);
      if (size > largest.value) largest = {size, i};
    }
    const double least = kRounding * block_.largest(largest).value;
    Choice blocking;
    for (std::int64_t i = first(); i < outcome_.count; i += step()) {
      if (slot_.coefficients[i] <= least) continue;
      const Choice here{-(slot_.multipliers[i] / slot_.coefficients[i]), i};
      if (here.beats(blocking)) blocking = here;
    }
    return block_.largest(blocking);
  }

  /// slack_j -= length * a_j . z. With h = W z a combination of rows of K, a_j . z = h_k - h_j.
  TACEXT_DEVICE void move_slack(std::int64_t p, double length) {
    // z = a_p - sum r_i a_i = R w_k - w_p + sum r_i w_i, R = 1 - sum r_i
    double rest = 0, at_target = 0;
    for (std::int64_t i = first(); i < outcome_.count; i += step()) {
      rest += slot_.coefficients[i];
      at_target += slot_.coefficients[i] * head_.gram_row(slot_.active[i])[target_];
    }
    rest = 1 - block_.sum(rest);
    at_target = block_.sum(at_target) +
                (rest * head_.gram_row(target_)[target_] - head_.gram_row(p)[target_]);
    for (std::int64_t j = first(); j < head_.classes; j += step()) {
      double here = rest * head_.gram_row(target_)[j] - head_.gram_row(p)[j];
      for (std::int64_t i = 0; i < outcome_.count; ++i)
        here += slot_.coefficients[i] * head_.gram_row(slot_.active[i])[j];
      slot_.slack[j] -= length * (at_target - here);
    }
    block_.barrier();
    for (std::int64_t i = first(); i < outcome_.count; i += step())
      slot_.slack[slot_.active[i]] = 0;  // complementary slackness, free of rounding
    block_.barrier();
  }

  /// a_p joins the active set, with the projection of the last project().
  TACEXT_DEVICE bool add(std::int64_t p, double curvature, double multiplier) {
    const std::int64_t last = outcome_.count;
    if (last == slot_.capacity) return false;
    double* const row = factor_row(last);
    for (std::int64_t i = first(); i < last; i += step()) row[i] = slot_.projection[i];
    if (block_.thread() == 0) {
      row[last] = std::sqrt(curvature);
      slot_.active[last] = p;
      slot_.multipliers[last] = multiplier;
      slot_.slack[p] = 0;
    }
    ++outcome_.count;
    block_.barrier();
    return true;
  }

  /// The blocking constraint leaves the active set.
  TACEXT_DEVICE void remove(std::int64_t index) {
    const std::int64_t left = outcome_.count - 1;
    for (std::int64_t begin = index; begin < left; begin += step()) {
      const std::int64_t i = begin + block_.thread();
      const std::int64_t constraint = i < left ? slot_.active[i + 1] : 0;
      const double multiplier = i < left ? slot_.multipliers[i + 1] : 0.0;
      block_.barrier();
      if (i < left) {
        slot_.active[i] = constraint;
        slot_.multipliers[i] = multiplier;
      }
      block_.barrier();
    }
    remove_from_factor(index, left);
    outcome_.count = left;
  }

  // ---- the packed Cholesky factor ----

  TACEXT_DEVICE double* factor_row(std::int64_t i) { return slot_.factor + i * (i + 1) / 2; }

  /// x = L^-1 x. Column by column: once x_i is final, every later entry is freed of it.
  TACEXT_DEVICE void solve_lower(double* x) {
    for (std::int64_t i = 0; i < outcome_.count; ++i) {
      const double solved = x[i] / factor_row(i)[i];
      for (std::int64_t r = i + 1 + first(); r < outcome_.count; r += step())
        x[r] -= factor_row(r)[i] * solved;
      block_.barrier();
    }
    divide_by_diagonal(x);
  }

  /// x = L^-T x
  TACEXT_DEVICE void solve_upper(double* x) {
    for (std::int64_t i = outcome_.count - 1; i >= 0; --i) {
      const double solved = x[i] / factor_row(i)[i];
      for (std::int64_t r = first(); r < i; r += step()) x[r] -= factor_row(i)[r] * solved;
      block_.barrier();
    }
    divide_by_diagonal(x);
  }

  /// The solves leave x_i undivided while others may still read it.
  TACEXT_DEVICE void divide_by_diagonal(double* x) {
    for (std::int64_t i = first(); i < outcome_.count; i += step()) x[i] /= factor_row(i)[i];
    block_.barrier();
  }

  /// Row and column `index` leave L L^T; `left` rows stay. As PackedCholesky::remove: each rotation
  /// turns the entry right of the diagonal into it, then the rows move up, one entry shorter.
  TACEXT_DEVICE void remove_from_factor(std::int64_t index, std::int64_t left) {
    for (std::int64_t i = index; i < left; ++i) {
      const double* const pivot = factor_row(i + 1);
      const double radius = std::hypot(pivot[i], pivot[i + 1]);
      const double cosine = pivot[i] / radius, sine = pivot[i + 1] / radius;
      block_.barrier();  // all have read the pivot
      for (std::int64_t r = i + first(); r < left; r += step()) {
        double* const entries = factor_row(r + 1) + i;
        const double before = entries[0], after = entries[1];
        entries[0] = cosine * before + sine * after;
        entries[1] = cosine * after - sine * before;
      }
      block_.barrier();
    }
    for (std::int64_t i = index; i < left; ++i) {
      for (std::int64_t c = first(); c <= i; c += step()) factor_row(i)[c] = factor_row(i + 1)[c];
      block_.barrier();
    }
  }

  // ---- refinement, with residuals taken from W itself ----

  TACEXT_DEVICE void refine() {
    constexpr int kRounds = 4;
    double before = kInfinity;
    combine();
    for (int round = 0; round < kRounds; ++round) {
      for (std::int64_t i = block_.group(); i < outcome_.count; i += block_.groups()) {
        const double* const row = head_.row(slot_.active[i]);
        double along = 0;
        for (std::int64_t d = block_.lane(); d < head_.latents; d += block_.lanes())
          along += (head_.row(target_)[d] - row[d]) * slot_.perturbation[d];
        along = block_.group_sum(along);
        if (block_.lane() == 0) slot_.residual[i] = margins_[slot_.active[i]] - along;
      }
      block_.barrier();
      Choice worst{0.0, -1}, size{0.0, -1};
      for (std::int64_t i = first(); i < outcome_.count; i += step()) {
        const Choice here{std::fabs(slot_.residual[i]), i};
        const Choice wanted{std::fabs(margins_[slot_.active[i]]), i};
        if (here.beats(worst)) worst = here;
        if (wanted.beats(size)) size = wanted;
      }
      const double error = block_.largest(worst).value;
      if (error <= 1e-15 * block_.largest(size).value || error > 0.5 * before) return;
      before = error;
      solve_lower(slot_.residual);
      solve_upper(slot_.residual);
      for (std::int64_t i = first(); i < outcome_.count; i += step()) {
        const double corrected = slot_.multipliers[i] + slot_.residual[i];
        slot_.multipliers[i] = corrected > 0 ? corrected : 0.0;
      }
      block_.barrier();
      combine();
    }
  }

  /// s = sum_i l_i (w_k - w_active[i])
  TACEXT_DEVICE void combine() {
    for (std::int64_t d = first(); d < head_.latents; d += step()) {
      double s = 0;
      for (std::int64_t i = 0; i < outcome_.count; ++i)
        s += slot_.multipliers[i] * (head_.row(target_)[d] - head_.row(slot_.active[i])[d]);
      slot_.perturbation[d] = s;
    }
    block_.barrier();
  }

  Block& block_;
  const Head head_;
  const Slot slot_;
  const std::int64_t target_;
  const double* const margins_;
  Outcome outcome_;
};

}  // namespace tacext::cuda
