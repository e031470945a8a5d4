#include <gtest/gtest.h>

#include "test_support.h"

// What is stored is judged, not what was found in the solver's units.
namespace tacext {
namespace {

using test::solve;
using test::TestHead;
using test::TestSolution;
using test::Values;

/// Two classes, each of one latent: |s_k / scale| = |m| / (|(w, w)| scale).
TestHead diagonal(double weight, double margin) {
  return {2, 2, {weight, 0, 0, weight}, {0, margin, margin, 0}};
}

void expect_nothing(const TestSolution& solution) {
  for (std::int64_t k = 0; k < 2; ++k) {
    EXPECT_TRUE(solution.is(k, Status::kIterationLimit));
    EXPECT_TRUE(std::isnan(solution.norm[k]));
    EXPECT_TRUE(std::isnan(solution.s(k)[0]));
    EXPECT_EQ(solution.primal[k], HUGE_VAL);
  }
}

TEST(ResultWriter, APerturbationThatNoDoubleHoldsIsNotOptimal) {
  const Values large(2, 1e130), small(2, 1e-100);
  expect_nothing(solve(diagonal(1e-250, 1e60), {}, large.data()));   // 1e310
  expect_nothing(solve(diagonal(1e150, 1e-200), {}, small.data()));  // 1e-350
  expect_nothing(solve(diagonal(1e150, 1e-165), {}, small.data()));  // 1e-315, with half its digits
}

TEST(ResultWriter, ANormThatNoDoubleHoldsIsNotOptimal) {
  const Values small(2, 1e-250);
  expect_nothing(solve(diagonal(1, 1e100), {}, small.data()));
}

TEST(ResultWriter, AnEntryThatCountsKeepsItsDigits) {
  const Values scale{1e-200, 1e200};
  // In the metric both entries count alike; stored, one is 5e-311.
  const TestHead head{2, 2, {1e200, 1e-200, 0, 0}, {0, 1e-110, -1, 0}};
  const TestSolution solution = solve(head, {}, scale.data());
  EXPECT_TRUE(solution.is(0, Status::kIterationLimit));
  EXPECT_EQ(solution.primal[0], HUGE_VAL);
  // Where it is 1e-20 of the other in the metric, it may vanish.
  const TestHead other{2, 2, {1e180, 1e-200, 0, 0}, {0, 1e-110, -1, 0}};
  EXPECT_TRUE(solve(other, {}, scale.data()).is(0, Status::kOptimal));
}

TEST(ResultWriter, ScalesOfEverySizeKeepWhatFits) {
  // Found and scale are far apart from 1, their product is not.
  for (const double unit : {1e-140, 1e-3, 1e140}) {
    SCOPED_TRACE(unit);
    const Values scale{unit, 0.5 * unit};
    TestHead head{2, 2, {1, 2, 0, 0}, {0, 5, -1, 0}};
    const TestSolution solution = solve(head, {}, scale.data());
    ASSERT_TRUE(solution.is(0, Status::kOptimal));
    EXPECT_NEAR(solution.s(0)[0], 2.5, 1e-14);  // a scale^2 = (1, 0.5), a . s = 5
    EXPECT_NEAR(solution.s(0)[1], 1.25, 1e-14);
    EXPECT_NEAR(solution.norm[0] * unit, std::hypot(2.5, 2.5), 1e-14);
  }
}

TEST(ResultWriter, MultipliersAreWrittenWhateverBecomesOfTheRest) {
  for (const TestHead& head : {diagonal(1e160, 1e-160), diagonal(1e-160, 1e160)}) {
    const TestSolution solution = solve(head);  // which checks that all is written
    for (std::int64_t k = 0; k < 2; ++k) {
      EXPECT_TRUE(solution.is(k, Status::kIterationLimit));
      EXPECT_EQ(solution.active[k],
                std::count_if(solution.l(k), solution.l(k) + 2, [](double l) { return l > 0; }));
    }
  }
}

// Of multipliers far apart the small one may belong to the long row.
TEST(ResultWriter, ASmallMultiplierThatVanishesIsNotOptimal) {
  TestHead head{3, 2, {0, 0, -1, 0, 0, -1e120}, {0, 1, 1e120, 0, 0, 0, 0, 0, 0}};
  ASSERT_TRUE(solve(head).is(0, Status::kOptimal));
  EXPECT_GT(solve(head).l(0)[2], 0);
  for (double& m : head.margins) m *= 1e-100;
  for (double& w : head.weight) w *= 1e40;  // l = (1e-180, 1e-300)
  EXPECT_TRUE(solve(head).is(0, Status::kOptimal));
  for (double& w : head.weight) w *= 1e20;  // l_2 = 1e-340
  EXPECT_TRUE(solve(head).is(0, Status::kIterationLimit));
}

// A power of two changes no digit: only s, the multipliers and the norm carry it.
TEST(ResultWriter, UnitsChangeNoDigit) {
  for (const std::int64_t classes : {9, 40}) {
    const TestHead head = test::random_head(classes, 12, 40, 60);
    const TestSolution plain = solve(head);
    struct Units {
      int weight, margins;
    };
    for (const Units units : {Units{-530, -530},
                              {530, 530},
                              {-350, 0},
                              {350, 0},
                              {0, 900},
                              {0, -900},
                              {-900, -900},
                              {900, 900}}) {
      SCOPED_TRACE(testing::Message() << units.weight << " " << units.margins);
      TestHead scaled = head;
      for (double& w : scaled.weight) w = std::ldexp(w, units.weight);
      for (double& m : scaled.margins) m = std::ldexp(m, units.margins);
      const int s_unit = units.margins - units.weight, l_unit = s_unit - units.weight;
      const TestSolution solution = solve(scaled);
      for (std::int64_t k = 0; k < classes; ++k) {
        ASSERT_TRUE(solution.is(k, Status::kOptimal)) << k;
        EXPECT_EQ(solution.norm[k], std::ldexp(plain.norm[k], s_unit));
        EXPECT_EQ(solution.s(k)[3], std::ldexp(plain.s(k)[3], s_unit));
        for (std::int64_t j = 0; j < classes; ++j)
          EXPECT_EQ(solution.l(k)[j], std::ldexp(plain.l(k)[j], l_unit));
        EXPECT_EQ(solution.primal[k], plain.primal[k]);
      }
    }
  }
}

TEST(ResultWriter, AnExtremeScaleKeepsTheAnswer) {
  const TestHead head = test::random_head(9, 12, 40, 61);
  const TestSolution plain = solve(head);
  for (const int exponent : {-400, 400, -997, 997}) {
    SCOPED_TRACE(exponent);
    const Values scale(12, std::ldexp(1.0, exponent));
    const TestSolution solution = solve(head, {}, scale.data());
    for (std::int64_t k = 0; k < 9; ++k) {
      // Multipliers are scale^-2: where they are no doubles, the answer lacks its proof.
      EXPECT_EQ(solution.is(k, Status::kOptimal), std::abs(exponent) == 400) << k;
      EXPECT_EQ(solution.primal[k] <= 1e-9, std::abs(exponent) == 400) << k;
      EXPECT_EQ(solution.norm[k], std::ldexp(plain.norm[k], -exponent)) << k;
      EXPECT_EQ(solution.s(k)[5], plain.s(k)[5]) << k;
    }
  }
}

TEST(ResultWriter, AMarginFarBelowZeroDoesNotHideTheOthers) {
  TestHead head = test::random_head(9, 12, 40, 62);
  const TestSolution plain = solve(head);
  for (const double below : {-1e200, -1e308}) {
    TestHead changed = head;
    for (double& m : changed.margins) m *= 1e-200;
    for (std::int64_t k = 0; k < 9; ++k) changed.margins[k * 9 + (k + 1) % 9] = below;
    const TestSolution solution = solve(changed);
    for (std::int64_t k = 0; k < 9; ++k) {
      ASSERT_TRUE(solution.is(k, Status::kOptimal));
      if (plain.l(k)[(k + 1) % 9] == 0) {
        EXPECT_NEAR(solution.norm[k] * 1e200, plain.norm[k], 1e-12 * plain.norm[k]);
      }
    }
  }
}

TEST(ResultWriter, ZeroFitsWhateverTheUnit) {
  for (const double unit : {1e-200, 1e200}) {
    TestHead head = test::random_head(4, 5, 10, 70);
    for (double& w : head.weight) w *= unit;
    for (double& m : head.margins) m = -unit;
    const TestSolution solution = solve(head);
    for (std::int64_t k = 0; k < 4; ++k) {
      ASSERT_TRUE(solution.is(k, Status::kOptimal));
      EXPECT_EQ(solution.norm[k], 0);
      EXPECT_EQ(solution.s(k)[2], 0);
    }
  }
}

}  // namespace
}  // namespace tacext
