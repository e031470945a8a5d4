#include <gtest/gtest.h>

#include "certificate.h"
#include "test_support.h"

namespace tacext {
namespace {

using test::TestHead;
using test::Values;

/// a = (1, 0), s_0 = (1, 0) where the margin is 1.
TestHead plain_head() { return {2, 2, {1, 0, 0, 0}, {0, 1, -1, 0}}; }

/// Class 0 of `head`, certified by both ways of taking residuals.
template <class Check>
void certified(const TestHead& head, const Values& s, const Values& l, const Check& check) {
  const HeadGeometry geometry({head.weight.data(), head.margins.data(), nullptr, nullptr,
                               head.classes, head.classes, head.latents},
                              serial_for);
  const Values squares = geometry.squared_lengths(0, geometry.gram_row(0));
  Values products(head.classes);
  geometry.packed().multiply(s.data(), 1, head.classes, products.data(), head.classes);
  for (const bool doubled : {false, true}) {
    SCOPED_TRACE(doubled);
    Candidate candidate;
    candidate.perturbation = s;
    candidate.multipliers = l;
    if (doubled)
      certify_doubled(geometry, 0, head.margins.data(), squares, 1e-9, candidate);
    else
      certify(geometry, 0, head.margins.data(), squares, products.data(), 1e-9, candidate);
    check(candidate);
  }
}

TEST(Certificate, TheAnswerHasNoResidual) {
  certified(plain_head(), {1, 0}, {0, 1}, [](const Candidate& c) {
    EXPECT_EQ(c.status, Status::kOptimal);
    EXPECT_EQ(c.worst_residual(), 0);
    EXPECT_EQ(c.collinearity, 2);
  });
}

TEST(Certificate, AViolationIsItsPrimalResidual) {
  certified(plain_head(), {0.5, 0}, {0, 0.5}, [](const Candidate& c) {
    EXPECT_EQ(c.status, Status::kIterationLimit);
    EXPECT_DOUBLE_EQ(c.primal, 0.5 / 1.5);
    EXPECT_EQ(c.dual, 0);
  });
}

TEST(Certificate, WhatTheMultipliersDoNotMakeIsItsDualResidual) {
  certified(plain_head(), {1, 1e-3}, {0, 1}, [](const Candidate& c) {
    EXPECT_EQ(c.status, Status::kIterationLimit);
    EXPECT_EQ(c.primal, 0);
    EXPECT_NEAR(c.dual, 0.5e-3, 1e-9);
  });
}

TEST(Certificate, ALongerPerturbationThanNeededIsItsGap) {
  certified(plain_head(), {1 + 1e-6, 0}, {0, 1 + 1e-6}, [](const Candidate& c) {
    EXPECT_EQ(c.status, Status::kIterationLimit);
    EXPECT_EQ(c.primal, 0);
    EXPECT_EQ(c.dual, 0);
    EXPECT_NEAR(c.gap, 2e-6, 1e-10);
  });
}

// s is sound and the dual residual small beside the terms that cancel, but the multipliers prove
// only a shorter one.
TEST(Certificate, TheGapBoundsTheNormWhereTermsCancel) {
  const TestHead head{3, 2, {0, 0, -1, 0, 1, -1e-10}, {0, 1, 1, 0, 0, 0, 0, 0, 0}};
  const double length = 2e10;
  // a_1 = (1, 0), a_2 = (-1, 1e-10): s = (1, 2e10) takes l_2 = 2e20 and l_1 = 2e20 + 1.
  certified(head, {1, length}, {0, 2e20, 2e20 * (1 - 1e-9)}, [](const Candidate& c) {
    EXPECT_LE(c.dual, 1e-9);
    EXPECT_GT(c.gap, 1e-9);
    EXPECT_EQ(c.status, Status::kIterationLimit);
  });
}

// Products of rows with a common component that cannot be taken off, summed over terms of one sign:
// their rounding drifts, where random roundings would not, and hides a violation from them.
TEST(Certificate, SumsOfLikeTermsHideNoViolation) {
  const test::TestHead head = test::drifting_head();
  for (const bool closed_form : {true, false}) {
    const test::TestSolution solution = test::solve(head, {1e-9, 0, closed_form});
    if (!solution.is(0, Status::kOptimal)) continue;
    const long double relative = test::violation_of(head, solution, 0).relative;
    EXPECT_LE(relative, 1e-9L);
    EXPECT_LE(relative, 1.01L * solution.primal[0] + 1e-15L);
  }
}

}  // namespace
}  // namespace tacext
