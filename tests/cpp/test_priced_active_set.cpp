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

// Fused multiply-adds round once where the baseline rounds twice: not the same bits, but as good.
TEST(PricedActiveSet, EveryInstructionSetSolvesToRounding) {
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
