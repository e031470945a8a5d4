#include <gtest/gtest.h>

#include "farkas_ray.h"
#include "test_support.h"

namespace tacext {
namespace {

using test::expect_unreachable;
using test::solve;
using test::TestHead;
using test::TestSolution;
using test::Values;

/// Class 0 at 0 between rows on either side, `below` of which the second is off their line.
TestHead between(double below, double first, double second) {
  TestHead head{3, 2, {0, 0, -1, 0, 1, -below}, Values(9, 0.0)};
  head.margins[1] = first;
  head.margins[2] = second;
  return head;
}

RayProof prove(const TestHead& head, const Values& ray, const double* scale = nullptr) {
  const HeadGeometry geometry({head.weight.data(), head.margins.data(), scale, nullptr,
                               head.classes, head.classes, head.latents},
                              serial_for);
  const Values squares = geometry.squared_lengths(0, geometry.gram_row(0));
  return prove_unreachable(geometry, 0, head.margins.data(), squares, ray);
}

const Values kHalves{0, 0.5, 0.5};

TEST(FarkasRay, ProvesWhatCancelsWhereTheMarginsDoNot) {
  EXPECT_TRUE(prove(between(0, 1, 1), kHalves).holds);
  EXPECT_EQ(prove(between(0, 1, 1), kHalves).value, 1);
  EXPECT_LE(prove(between(0, 1, 1), kHalves).dual, 1e-150);
  EXPECT_TRUE(prove(between(0, 1, -0.5), kHalves).holds);
  EXPECT_FALSE(prove(between(0, 1, -1), kHalves).holds) << "m.l = 0";
  EXPECT_FALSE(prove(between(0, 1, -2), kHalves).holds) << "m.l < 0";
  EXPECT_FALSE(prove(between(0, 1, -1 + 1e-14), kHalves).holds) << "m.l is rounding";
}

// What a ray leaves of a_j bounds |s| only as far as m.l goes.
TEST(FarkasRay, ProvesABoundOf1e13AndNoLess) {
  EXPECT_TRUE(prove(between(1e-13, 1, 1), kHalves).holds);
  EXPECT_FALSE(prove(between(1e-12, 1, 1), kHalves).holds);
  EXPECT_FALSE(prove(between(1e-8, 1, 1), kHalves).holds);
  EXPECT_FALSE(prove(between(5e-14, 1, -1 + 3e-13), kHalves).holds);
  EXPECT_FALSE(prove(between(1e-14, 1, -0.99), kHalves).holds);
  EXPECT_TRUE(prove(between(1e-16, 1, -0.99), kHalves).holds);
}

// In doubles 1 - 1e-17 is 1: the ray must not seem to cancel.
TEST(FarkasRay, RoundingOfItsSumsHidesNothing) {
  const double tiny = std::ldexp(1.0, -60);
  const TestHead head{3, 2, {tiny, 0, -1, 0, 1, 0}, {0, 1, -1 + 1e-10, 0, 0, 0, 0, 0, 0}};
  const RayProof proof = prove(head, kHalves);
  EXPECT_NEAR(proof.dual, tiny, 1e-3 * tiny);
  EXPECT_NEAR(proof.value, 0.5e-10, 1e-16);
  EXPECT_FALSE(
      prove({3, 2, {tiny, 0, -1, 0, 1, 0}, {0, 1, -1 + 3e-13, 0, 0, 0, 0, 0, 0}}, kHalves).holds);
}

TEST(FarkasRay, RowsThatUnderflowAreNotEqual) {
  // The middle of the rows is huge; beside it the first two become 0.
  TestHead head{10, 2, Values(20, 1e150), Values(100, -1.0)};
  for (std::int64_t j = 0; j < 10; ++j) head.weight[j * 2] = j < 2 ? 0 : static_cast<double>(j);
  for (std::int64_t j = 2; j < 10; ++j) head.weight[j * 2] *= 1e150;
  head.weight[0] = 1e-180;
  head.weight[1] = head.weight[3] = 0;
  head.margins[1] = 1e-180;
  Values ray(10, 0.0);
  ray[1] = 1;
  EXPECT_FALSE(prove(head, ray).holds);
  EXPECT_TRUE(solve(head).is(0, Status::kIterationLimit));
  head.weight[0] = 0;
  EXPECT_TRUE(prove(head, ray).holds);
  EXPECT_TRUE(solve(head).is(0, Status::kUnreachable));
}

TEST(FarkasRay, NothingIsProvenAtTheEndsOfTheRange) {
  for (const double unit : {1e-305, 1e308}) {
    TestHead head = between(0, 1, 1);
    for (double& w : head.weight) w *= unit;
    head.weight[2] *= 1.5;  // no difference of 1e308 is a double
    EXPECT_FALSE(prove(head, kHalves).holds) << unit;
  }
  EXPECT_FALSE(prove(between(0, 1e-290, 1e-290), kHalves).holds);
}

// Rounded products that cancel, but for low halves that underflow: m.l is too little for those.
TEST(FarkasRay, LowHalvesThatUnderflowAreNotTakenForZero) {
  for (int step = 1; step < 50; ++step) {
    const double first = 0.5 + std::ldexp(step, -53), unit = 3.37e-308;
    const double other = unit * (2 * first);  // rounds, so that first * unit - other / 2 does not
    const TestHead head{3, 1, {0, -unit, other}, {0, 1, -1 + 1e-10, 0, 0, 0, 0, 0, 0}};
    EXPECT_FALSE(prove(head, {0, first, 0.5}).holds) << step;
  }
}

TEST(FarkasRay, AScaleChangesTheMeasureAlone) {
  const Values flat{1.0, 1e-4};
  EXPECT_FALSE(prove(between(1e-10, 1, 1), kHalves).holds);
  EXPECT_TRUE(prove(between(1e-10, 1, 1), kHalves, flat.data()).holds);
}

// The constraint of a row just off the line can be met, at any price below 1e13.
TEST(FarkasRay, AClassJustOutsideTheHullIsReachable) {
  for (const double below : {1e-3, 1e-6, 1e-9, 1e-11, 1e-12}) {
    const TestSolution solution = solve(between(below, 1, 1));
    ASSERT_TRUE(solution.is(0, Status::kOptimal)) << below;
    EXPECT_NEAR(solution.norm[0], std::hypot(1, 2 / below), 1e-12 / below);
  }
  const TestHead beyond = between(1e-15, 1, 1);
  ASSERT_TRUE(solve(beyond).is(0, Status::kUnreachable));
  expect_unreachable(beyond, solve(beyond), 0, 0);
}

// Margins that cancel as the rows do: the answer is near, however nearly a ray exists.
TEST(FarkasRay, MarginsThatNearlyCancelLeaveTheClassReachable) {
  const double below = 5e-14, second = -1 + 3e-13;
  const TestHead head = between(below, 1, second);
  for (const bool closed_form : {true, false}) {
    const TestSolution solution = solve(head, {1e-9, 0, closed_form});
    ASSERT_TRUE(solution.is(0, Status::kOptimal));
    EXPECT_NEAR(solution.s(0)[0], 1, 1e-14);
    EXPECT_NEAR(solution.s(0)[1], (1 + second) / below, 1e-9);
  }
}

TEST(FarkasRay, AnUnprovenRayIsNoAnswer) {
  // Beyond 1e14 the rows count as one line, and the margins say too little for a proof.
  const TestSolution solution = solve(between(1e-15, 1, -1 + 1e-4));
  ASSERT_TRUE(solution.is(0, Status::kIterationLimit));
  EXPECT_TRUE(std::isnan(solution.norm[0]));
  EXPECT_TRUE(std::isnan(solution.s(0)[1]));
  EXPECT_EQ(Values(solution.l(0), solution.l(0) + 3), Values(3, 0.0));
  EXPECT_EQ(solution.active[0], 0);
  EXPECT_EQ(std::min({solution.primal[0], solution.dual[0], solution.gap[0]}), HUGE_VAL);
}

}  // namespace
}  // namespace tacext
