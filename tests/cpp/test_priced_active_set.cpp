#include <gtest/gtest.h>

#include "head_geometry.h"
#include "orthogonal_active_set.h"
#include "priced_active_set.h"
#include "test_support.h"

namespace tacext {
namespace {

using test::NamedHead;
using test::TestHead;
using test::TestSolution;
using test::Values;

/// A simplex up to noise and equal margins: most constraints of every class are active.
TestHead collapsed_head(std::int64_t classes, unsigned seed) {
  TestHead head{classes, classes, test::normal_values(classes * classes, seed, 0.001),
                test::normal_values(classes * classes, seed + 1, 0.004)};
  for (std::int64_t j = 0; j < classes; ++j) head.weight[j * classes + j] += 1;
  for (double& margin : head.margins) margin += 1;
  return head;
}

/// Larger heads that take several rounds of pricing.
std::vector<NamedHead> larger_heads() {
  return {{"random", test::random_head(200, 60, 400, 50)},
          {"more latents", test::random_head(150, 300, 400, 51)},
          {"few latents", test::random_head(160, 9, 400, 52)},
          {"collapsed", collapsed_head(140, 53)}};
}

PerturbationProblem problem_of(const TestHead& head, const std::vector<std::int64_t>* targets) {
  return {head.weight.data(),
          head.margins.data(),
          nullptr,
          targets ? targets->data() : nullptr,
          targets ? static_cast<std::int64_t>(targets->size()) : head.classes,
          head.classes,
          head.latents};
}

TEST(PricedActiveSet, EqualsTheOrthogonalMethod) {
  for (const NamedHead& named : larger_heads()) {
    SCOPED_TRACE(named.name);
    const TestHead& head = named.head;
    const HeadGeometry geometry(problem_of(head, nullptr), serial_for);
    ASSERT_TRUE(geometry.has_gram());
    for (std::int64_t k = 0; k < head.classes; k += 13) {
      SCOPED_TRACE(k);
      const double* const margins = head.margins.data() + k * head.classes;
      PricedActiveSet priced(geometry, k, margins, geometry.gram_row(k), 10000);
      priced.solve();
      OrthogonalActiveSet orthogonal(geometry, k, margins, priced.squared_lengths());
      ASSERT_EQ(orthogonal.solve(10000), priced.ending());
      if (priced.ending() != Ending::kSolved) continue;
      Values left(head.classes, 0.0), right(head.classes, 0.0);
      for (std::size_t i = 0; i < priced.set().active.size(); ++i)
        left[priced.set().active[i]] = priced.set().multipliers[i];
      for (std::size_t i = 0; i < orthogonal.set().active.size(); ++i)
        right[orthogonal.set().active[i]] = orthogonal.set().multipliers[i];
      const double largest = *std::max_element(right.begin(), right.end());
      for (std::int64_t j = 0; j < head.classes; ++j)
        EXPECT_NEAR(left[j], right[j], 1e-8 * largest);
    }
  }
}

TEST(PricedActiveSet, CollapsedHeadsTakeSeveralRounds) {
  const TestHead head = collapsed_head(140, 53);
  const TestSolution solution = test::solve(head);
  for (std::int64_t k = 0; k < head.classes; ++k) {
    ASSERT_TRUE(solution.is(k, Status::kOptimal)) << k;
    EXPECT_GT(solution.active[k], 64) << k;
    EXPECT_LE(std::max({solution.primal[k], solution.dual[k], solution.gap[k]}), 1e-12) << k;
  }
}

// Few classes of many are solved without K, in double and in float margins.
TEST(PricedActiveSet, AShortListWithoutTheGramMatrixAgrees) {
  const std::vector<std::int64_t> targets{3, 149, 3, 90};
  for (const NamedHead& named : larger_heads()) {
    if (named.head.classes < 150) continue;
    SCOPED_TRACE(named.name);
    ASSERT_FALSE(HeadGeometry(problem_of(named.head, &targets), serial_for).has_gram());
    TestHead head = named.head;
    const std::vector<float> single(head.margins.begin(), head.margins.end());
    head.margins.assign(single.begin(), single.end());
    const TestSolution all = test::solve(head), few = test::solve(head, {}, nullptr, &targets);
    TestSolution floats(4, head.classes, head.latents);
    PerturbationProblem problem = problem_of(head, &targets);
    problem.margins = nullptr;
    problem.margins_single = single.data();
    minimal_perturbation(problem, {}, floats.pointers(), serial_for);
    EXPECT_EQ(floats.multipliers, few.multipliers);
    for (std::size_t i = 0; i < targets.size(); ++i) {
      SCOPED_TRACE(targets[i]);
      ASSERT_EQ(few.status[i], all.status[targets[i]]);
      if (!few.is(i, Status::kOptimal)) continue;
      EXPECT_NEAR(few.norm[i], all.norm[targets[i]], 1e-12 * few.norm[i]);
      EXPECT_LE(std::max({few.primal[i], few.dual[i], few.gap[i]}), 1e-12);
    }
  }
}

// Matrix products of every width (simd_width), with the other functions of this machine. Fused
// multiply-adds round once where the baseline rounds twice: not the same bits, but as good.
TEST(PricedActiveSet, KernelsOfEveryWidthSolveToRounding) {
  for (const NamedHead& named : larger_heads()) {
    SCOPED_TRACE(named.name);
    const TestSolution wanted = test::solve(named.head);
    test::with_each_simd_width([&] {
      const TestSolution got = test::solve(named.head);
      ASSERT_EQ(got.status, wanted.status);
      for (std::int64_t k = 0; k < got.count; ++k) {
        if (!got.is(k, Status::kOptimal)) continue;
        EXPECT_NEAR(got.norm[k], wanted.norm[k], 1e-12 * wanted.norm[k]) << k;
        EXPECT_LE(std::max({got.primal[k], got.dual[k], got.gap[k]}), 1e-12) << k;
      }
    });
  }
}

/// Runs a method to its end, with products of W itself; returns how many checks it took.
int run(PricedActiveSet& method, const HeadGeometry& geometry) {
  method.solve();
  for (int checks = 1;; ++checks) {
    Values s(geometry.latents(), 0.0), products(geometry.classes());
    for (std::size_t i = 0; i < method.set().active.size(); ++i)
      for (std::int64_t d = 0; d < geometry.latents(); ++d)
        s[d] += method.set().multipliers[i] *
                (geometry.row(method.target())[d] - geometry.row(method.set().active[i])[d]);
    geometry.packed().multiply(s.data(), 1, geometry.classes(), products.data(),
                               geometry.classes());
    if (method.check(products.data())) return checks;
  }
}

/// Some rows, on a grid, are the exact mean of 64 others: no perturbation leads there.
TestHead hull_head(const std::vector<std::int64_t>& inside) {
  const std::int64_t classes = 160, latents = 40;
  TestHead head = test::random_head(classes, latents, 100, 54);
  for (double& w : head.weight) w = std::ldexp(std::round(std::ldexp(w, 20)), -20);
  for (std::size_t i = 0; i < inside.size(); ++i)
    for (std::int64_t d = 0; d < latents; ++d) {
      double sum = 0;
      for (std::int64_t n = 0; n < 64; ++n)
        sum += head.weight[(10 + 40 * static_cast<std::int64_t>(i) + n) * latents + d];
      head.weight[inside[i] * latents + d] = sum / 64;
    }
  head.margins = test::random_margins(head.weight, classes, latents, 100, 55);
  return head;
}

TEST(PricedActiveSet, ProvesUnreachableOverSeveralRounds) {
  const std::vector<std::int64_t> inside{0, 7, 159};
  const TestHead head = hull_head(inside);
  for (const bool listed : {false, true}) {  // a short list goes without K
    SCOPED_TRACE(listed);
    const HeadGeometry geometry(problem_of(head, listed ? &inside : nullptr), serial_for);
    ASSERT_EQ(geometry.has_gram(), !listed);
    const TestSolution solution = test::solve(head, {}, nullptr, listed ? &inside : nullptr);
    for (std::size_t i = 0; i < inside.size(); ++i) {
      SCOPED_TRACE(inside[i]);
      const std::int64_t k = inside[i];
      const double* const margins = head.margins.data() + k * head.classes;
      Values row(head.classes);
      geometry.packed().multiply(geometry.row(k), 1, head.classes, row.data(), head.classes);
      PricedActiveSet method(geometry, k, margins, row.data(), 10000);
      const int checks = run(method, geometry);
      EXPECT_EQ(method.ending(), Ending::kUnreachable);
      EXPECT_GT(method.set().iterations, 32) << "more than one block";
      if (listed) {
        EXPECT_GT(checks, 2);
      }
      test::expect_unreachable(head, solution, listed ? static_cast<std::int64_t>(i) : k, k);
    }
    if (listed) continue;
    for (std::int64_t k = 0; k < head.classes; ++k)
      EXPECT_EQ(solution.is(k, Status::kUnreachable),
                std::count(inside.begin(), inside.end(), k) > 0)
          << k;
  }
}

// Without K a check works one round: rounds that gain must not count against it.
TEST(PricedActiveSet, TakesAsManyChecksAsThereAreRounds) {
  const TestHead head = collapsed_head(140, 53);
  const std::vector<std::int64_t> targets{3, 90};
  const HeadGeometry geometry(problem_of(head, &targets), serial_for);
  ASSERT_FALSE(geometry.has_gram());
  for (const std::int64_t k : targets) {
    Values row(head.classes);
    geometry.packed().multiply(geometry.row(k), 1, head.classes, row.data(), head.classes);
    PricedActiveSet method(geometry, k, head.margins.data() + k * head.classes, row.data(), 10000);
    EXPECT_GT(run(method, geometry), 3);
    EXPECT_EQ(method.ending(), Ending::kSolved);
  }
}

// An equal row that must be beaten cannot be: found at once, however far others are from holding.
TEST(PricedActiveSet, AConstraintThatCannotHoldEndsTheMethod) {
  TestHead head = test::random_head(40, 20, 30, 56);
  std::copy_n(head.weight.begin() + 2 * 20, 20, head.weight.begin() + 6 * 20);
  head.margins = test::random_margins(head.weight, 40, 20, 30, 57);
  head.margins[2 * 40 + 6] = 1e-3;
  const HeadGeometry geometry(problem_of(head, nullptr), serial_for);
  PricedActiveSet method(geometry, 2, head.margins.data() + 2 * 40, geometry.gram_row(2), 10000);
  method.solve();
  EXPECT_EQ(method.ending(), Ending::kUnreachable);
  EXPECT_EQ(method.set().active, std::vector<std::int64_t>{6});
}

/// The classes whose constraints one round makes active, most violated first.
std::vector<std::int64_t> first_round(const TestHead& head, std::int64_t target) {
  const std::vector<std::int64_t> targets{target};
  const HeadGeometry geometry(problem_of(head, &targets), serial_for);
  Values row(head.classes);
  geometry.packed().multiply(geometry.row(target), 1, head.classes, row.data(), head.classes);
  PricedActiveSet method(geometry, target, head.margins.data() + target * head.classes, row.data(),
                         10000);
  method.solve();
  return method.set().active;
}

// Lengths that overflowed to NaN would spoil the order of the candidates.
TEST(PricedActiveSet, ConstraintsThatOverflowAreNoCandidates) {
  TestHead head = test::random_head(200, 60, 100, 58);
  const auto overflows = [](std::int64_t j) { return j % 5 == 2; };
  for (std::int64_t j = 0; j < 200; ++j)
    for (std::int64_t d = 0; d < 60; ++d)
      head.weight[j * 60 + d] *= overflows(j) ? 1e170 : j < 60 ? 1e150 : 1.0;
  TestHead without = head;
  for (std::int64_t k = 0; k < 60; ++k)
    for (std::int64_t j = 0; j < 200; ++j) {  // the small rows, all alike beside row k, hold
      const double wanted = 1e150 * (1 + std::fabs(head.margin(k, j)));
      head.margins[k * 200 + j] = j < 60 || overflows(j) ? wanted : -1;
      without.margins[k * 200 + j] = overflows(j) ? -1 : head.margin(k, j);
    }
  for (std::int64_t k = 0; k < 60; k += 5) {
    const std::vector<std::int64_t> active = first_round(head, k);
    EXPECT_GT(active.size(), 3u) << k;
    EXPECT_EQ(active, first_round(without, k)) << k;
  }
}

// Nearly of rank 3: prices from K lose what a round gains, and only the check can tell.
TEST(PricedActiveSet, RoundingOfTheGramMatrixEndsNoClassAtItsLimit) {
  TestHead head{100, 64, test::normal_values(100 * 64, 60, 1e-6), {}};
  const Values left = test::normal_values(100 * 3, 61), right = test::normal_values(3 * 64, 62);
  for (std::int64_t j = 0; j < 100; ++j)
    for (std::int64_t d = 0; d < 64; ++d)
      for (std::int64_t r = 0; r < 3; ++r)
        head.weight[j * 64 + d] += left[j * 3 + r] * right[r * 64 + d];
  head.margins = test::random_margins(head.weight, 100, 64, 100, 63);
  const TestSolution solution = test::solve(head);
  for (std::int64_t k = 0; k < 100; ++k) {
    EXPECT_FALSE(solution.is(k, Status::kIterationLimit)) << k;
    EXPECT_LE(solution.iterations[k], 400) << k;
  }
}

// Rows in three clusters take several rounds without K, each of which makes a factor that needs
// refinement of its own.
TEST(PricedActiveSet, EveryRoundIsRefined) {
  const std::vector<std::int64_t> targets{3, 199};
  for (unsigned seed = 70; seed < 90; ++seed) {
    TestHead head{200, 140, test::normal_values(200 * 140, seed, 2e-3), {}};
    const Values centres = test::normal_values(3 * 140, seed + 1);
    for (std::int64_t j = 0; j < 200; ++j)
      for (std::int64_t d = 0; d < 140; ++d)
        head.weight[j * 140 + d] += centres[j * 7 % 3 * 140 + d];
    head.margins = test::random_margins(head.weight, 200, 140, 20, seed + 2);
    const TestSolution solution = test::solve(head, {}, nullptr, &targets);
    for (std::int64_t i = 0; i < 2; ++i) {
      ASSERT_TRUE(solution.is(i, Status::kOptimal)) << seed;
      EXPECT_LE(solution.primal[i], 1e-12) << seed;
    }
  }
}

// A row just outside the hull of two others: its terms nearly cancel, so that both ways are gone.
TEST(PricedActiveSet, StepsOfBothWaysAreCounted) {
  const TestHead head{3, 2, {1, 0, -1, 0, 0, 1e-6}, Values(9, 1.0)};
  const HeadGeometry geometry(problem_of(head, nullptr), serial_for);
  const double* const margins = head.margins.data() + 2 * 3;
  PricedActiveSet priced(geometry, 2, margins, geometry.gram_row(2), 1000);
  run(priced, geometry);
  OrthogonalActiveSet orthogonal(geometry, 2, margins, priced.squared_lengths());
  ASSERT_EQ(orthogonal.solve(1000), Ending::kSolved);
  EXPECT_EQ(test::solve(head, {1e-9, 0, false}).iterations[2],
            priced.set().iterations + orthogonal.set().iterations);
}

TEST(PricedActiveSet, StopsAtTheIterationLimitInsideABlock) {
  const TestHead head = collapsed_head(140, 53);
  for (const std::int64_t limit : {1, 31, 50}) {
    const TestSolution solution = test::solve(head, {1e-9, limit, false});
    for (std::int64_t k = 0; k < head.classes; ++k) {
      EXPECT_TRUE(solution.is(k, Status::kIterationLimit)) << k;
      EXPECT_LE(solution.iterations[k], limit) << k;
    }
  }
}

}  // namespace
}  // namespace tacext
