#include <gtest/gtest.h>

#include "careful_solution.h"
#include "orthogonal_active_set.h"
#include "test_support.h"

namespace tacext {
namespace {

using test::solve;
using test::TestHead;
using test::TestSolution;
using test::Values;

HeadGeometry geometry_of(const TestHead& head) {
  return HeadGeometry({head.weight.data(), head.margins.data(), nullptr, nullptr, head.classes,
                       head.classes, head.latents},
                      serial_for);
}

/// Rank 3 but for noise: constraints that nearly cancel, and an s that is their small difference.
TestHead nearly_flat_head(double noise, unsigned seed, std::int64_t latents = 64) {
  TestHead head{40, latents, test::normal_values(40 * latents, seed, noise), {}};
  const Values left = test::normal_values(40 * 3, seed + 1),
               right = test::normal_values(3 * latents, seed + 2);
  for (std::int64_t j = 0; j < 40; ++j)
    for (std::int64_t d = 0; d < latents; ++d)
      for (std::int64_t r = 0; r < 3; ++r)
        head.weight[j * latents + d] += left[j * 3 + r] * right[r * latents + d];
  head.margins = test::random_margins(head.weight, 40, latents, 40, seed + 3);
  return head;
}

/// How far |s|^2 is from what the multipliers prove, by sums in long double.
double gap_of(const TestHead& head, const TestSolution& solution, std::int64_t k) {
  long double value = 0, made = 0, energy = 0;
  for (std::int64_t j = 0; j < head.classes; ++j)
    if (j != k) value += static_cast<long double>(solution.l(k)[j]) * head.margin(k, j);
  for (std::int64_t d = 0; d < head.latents; ++d) {
    long double sum = 0;
    for (std::int64_t j = 0; j < head.classes; ++j)
      sum += solution.l(k)[j] * (static_cast<long double>(head.weight[k * head.latents + d]) -
                                 head.weight[j * head.latents + d]);
    made += sum * sum;
    energy += static_cast<long double>(solution.s(k)[d]) * solution.s(k)[d];
  }
  return static_cast<double>(std::fabs(energy - (2 * value - made)) / energy);
}

TEST(CarefulSolution, NearlyFlatHeadsAreProven) {
  for (const double noise : {1e-7, 1e-8, 1e-9, 1e-10})
    for (unsigned seed = 0; seed < 3; ++seed) {
      SCOPED_TRACE(testing::Message() << noise << ", seed " << seed);
      const TestHead head = nearly_flat_head(noise, 10 * seed);
      const TestSolution solution = solve(head);
      for (std::int64_t k = 0; k < head.classes; ++k) {
        ASSERT_TRUE(solution.is(k, Status::kOptimal)) << k;
        EXPECT_LE(gap_of(head, solution, k), 3e-9) << k;
        EXPECT_LE(solution.gap[k], 1e-9) << k;
        EXPECT_LE(solution.primal[k], 1e-13) << k;
      }
    }
}

// Latents from 1e-6 to 1e6: the terms of s are 1e12 times as long as s, and rounded to doubles they
// prove its norm to some 1e-8.
TEST(CarefulSolution, MultipliersAreJudgedBeforeTheyAreRounded) {
  int far = 0;
  for (unsigned seed = 0; seed < 10; ++seed) {
    TestHead head = test::random_head(12, 4, 30, 300 + seed);
    for (std::int64_t j = 0; j < 12; ++j)
      for (std::int64_t d = 0; d < 4; ++d)
        head.weight[j * 4 + d] *= std::pow(10.0, static_cast<double>(4 * d) - 6);
    const TestSolution solution = solve(head);
    for (std::int64_t k = 0; k < 12; ++k) {
      EXPECT_FALSE(solution.is(k, Status::kIterationLimit)) << seed << " " << k;
      if (!solution.is(k, Status::kOptimal)) continue;
      EXPECT_LE(solution.gap[k], 1e-11) << seed << " " << k;
      far += gap_of(head, solution, k) > 1e-10;
    }
  }
  EXPECT_GT(far, 0) << "a rounding that never shows tests nothing";
}

// |a_1| |s| is 1e16 beside a slack of 1e-6, sum_d |a_1d s_d| is 0: measured by the one, the
// constraint would seem to hold.
TEST(CarefulSolution, SeesSmallEntriesBesideAHugePerturbation) {
  const TestHead head{3, 2, {0, 0, 0, -1, -1e-16, 0}, {0, 1e-6, 1, 0, 0, 0, 0, 0, 0}};
  const HeadGeometry geometry = geometry_of(head);
  const Values squares = geometry.squared_lengths(0, geometry.gram_row(0));
  OrthogonalActiveSet method(geometry, 0, head.margins.data(), squares);
  ASSERT_EQ(method.solve(100), Ending::kSolved);
  EXPECT_EQ(method.set().active.size(), 2u);
  const TestSolution solution = solve(head);
  ASSERT_TRUE(solution.is(0, Status::kOptimal));
  EXPECT_NEAR(solution.s(0)[1], 1e-6, 1e-20);
}

// The other way round: |a_j| alone is less than the rounding of a_j . s, which is no violation.
TEST(CarefulSolution, RoundingOfAHugePerturbationIsNoViolation) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    const TestHead head = nearly_flat_head(1e-9, 100 + 10 * seed);
    const HeadGeometry geometry = geometry_of(head);
    const Values squares = geometry.squared_lengths(0, geometry.gram_row(0));
    OrthogonalActiveSet method(geometry, 0, head.margins.data(), squares);
    EXPECT_EQ(method.solve(300), Ending::kSolved) << seed;
  }
}

// Twins of active constraints hold to the rounding of s: nothing may come and go for it.
TEST(CarefulSolution, TwinsOfActiveConstraintsDoNotCycle) {
  for (unsigned seed = 0; seed < 10; ++seed) {
    const std::int64_t latents = seed % 2 ? 64 : 3000;
    TestHead head = nearly_flat_head(1e-9, 200 + 10 * seed, latents);
    for (std::int64_t j = 21; j < 40; ++j) {
      std::copy_n(head.weight.begin() + (j - 20) * latents, latents,
                  head.weight.begin() + j * latents);
      head.margins[j] = head.margins[j - 20];
    }
    const HeadGeometry geometry = geometry_of(head);
    const Values squares = geometry.squared_lengths(0, geometry.gram_row(0));
    OrthogonalActiveSet method(geometry, 0, head.margins.data(), squares);
    EXPECT_EQ(method.solve(300), Ending::kSolved) << seed;
    EXPECT_LE(method.set().iterations, 100) << seed;
  }
}

// Plain sums of 20,000 like terms drift by more than the rounding of s.
TEST(CarefulSolution, SumsOfLikeTermsAreNoViolation) {
  constexpr std::int64_t kLatents = 20000;
  for (int step = 0; step < 20; ++step) {
    TestHead head{3, kLatents, Values(3 * kLatents, -1 - step / 37.0), Values(9, 0.0)};
    std::fill_n(head.weight.begin(), kLatents, 0.0);
    head.margins[1] = head.margins[2] = 1 + step / 19.0;  // of twins
    const HeadGeometry geometry = geometry_of(head);
    const Values squares = geometry.squared_lengths(0, geometry.gram_row(0));
    OrthogonalActiveSet method(geometry, 0, head.margins.data(), squares);
    EXPECT_EQ(method.solve(100), Ending::kSolved);
    EXPECT_EQ(method.set().iterations, 1) << step;
    EXPECT_LE(solve_carefully(geometry, 0, head.margins.data(), squares, 1e-9, 100).primal, 1e-15);
  }
}

/// Rows in three clusters.
TestHead three_clusters(std::int64_t classes, std::int64_t latents, double apart, unsigned seed) {
  TestHead head{classes, latents, test::normal_values(classes * latents, seed, apart), {}};
  const Values centres = test::normal_values(3 * latents, seed + 1);
  for (std::int64_t j = 0; j < classes; ++j)
    for (std::int64_t d = 0; d < latents; ++d)
      head.weight[j * latents + d] += centres[j * 7 % 3 * latents + d];
  head.margins = test::random_margins(head.weight, classes, latents, 20, seed + 2);
  return head;
}

// A violation of share e can shorten s by e times as much as the terms of s exceed it.
TEST(CarefulSolution, NoViolationShortensTheNormByMoreThanTheTolerance) {
  for (const double apart : {3e-6, 1e-6, 3e-7, 1e-7})
    for (unsigned seed = 0; seed < 10; ++seed) {
      const TestHead head = three_clusters(40, 64, apart, 10 * seed);
      const TestSolution solution = solve(head);
      for (std::int64_t k = 0; k < head.classes; ++k) {
        if (!solution.is(k, Status::kOptimal)) continue;
        double terms = solution.norm[k];
        for (std::int64_t j = 0; j < head.classes; ++j) {
          double square = 0;
          for (std::int64_t d = 0; d < 64; ++d) square += std::pow(head.constraint(k, j, d), 2);
          terms += solution.l(k)[j] * std::sqrt(square);
        }
        EXPECT_LE(solution.primal[k] * terms, 1.01e-9 * solution.norm[k]) << apart << " " << k;
      }
    }
}

TEST(CarefulSolution, AFastAnswerOutlivesItsSteps) {
  const TestHead head{3, 2, {1, 0, -1, 0, 0, 1e-6}, Values(9, 1.0)};
  for (const std::int64_t limit : {2, 3}) {
    const TestSolution solution = solve(head, {1e-9, limit, false});
    EXPECT_TRUE(solution.is(2, Status::kIterationLimit)) << limit;
    EXPECT_NEAR(solution.norm[2], 1e6, 1e-6) << limit;
    EXPECT_EQ(solution.iterations[2], limit);
    EXPECT_EQ(solution.primal[2], HUGE_VAL) << "not judged by the way that could";
  }
  EXPECT_TRUE(solve(head, {1e-9, 4, false}).is(2, Status::kOptimal));
}

// Of two answers without a proof the better one is kept.
TEST(CarefulSolution, StepsThatAreSpentLeaveTheFastAnswer) {
  const TestHead head = test::random_head(30, 40, 60, 35);
  const TestSolution solution = solve(head, {1e-9, 3, false});
  std::int64_t unproven = 0;
  for (std::int64_t k = 0; k < head.classes; ++k) {
    if (!solution.is(k, Status::kIterationLimit)) continue;
    ++unproven;
    EXPECT_GT(solution.norm[k], 0) << k;
    EXPECT_EQ(solution.iterations[k], 3) << k;
  }
  EXPECT_GT(unproven, 10);
}

}  // namespace
}  // namespace tacext
