#include <gtest/gtest.h>

#include "closed_form.h"
#include "test_support.h"

namespace tacext {
namespace {

using test::solve;
using test::TestHead;
using test::TestSolution;
using test::Values;

std::unique_ptr<ClosedForm> closed_form_of(const TestHead& head) {
  const HeadGeometry geometry({head.weight.data(), head.margins.data(), nullptr, nullptr,
                               head.classes, head.classes, head.latents},
                              serial_for);
  return ClosedForm::make(geometry);
}

TEST(ClosedForm, IsMadeForIndependentRowsAlone) {
  TestHead head = test::random_head(6, 9, 20, 1);
  EXPECT_NE(closed_form_of(head), nullptr);
  EXPECT_EQ(closed_form_of(test::random_head(6, 4, 20, 1)), nullptr) << "fewer latents";
  // So close that the factor exists, and means nothing.
  for (std::int64_t d = 0; d < 9; ++d)
    head.weight[3 * 9 + d] = head.weight[2 * 9 + d] * (1 + 1e-7 * static_cast<double>(d % 3));
  EXPECT_EQ(closed_form_of(head), nullptr);
}

TEST(ClosedForm, IsNotMadeOfAMatrixThatOverflowed) {
  TestHead head = test::random_head(6, 9, 20, 2);
  for (std::int64_t d = 0; d < 9; ++d) head.weight[4 * 9 + d] *= 1e160;
  EXPECT_EQ(closed_form_of(head), nullptr);
}

// Rows that sum to zero make K singular, and are no reason to do without.
TEST(ClosedForm, ServesACentredSimplex) {
  TestHead head{5, 5, Values(25, -1.0), Values(25, 1.0)};
  for (std::int64_t j = 0; j < 5; ++j) head.weight[j * 6] = 4;
  const TestSolution solution = solve(head);
  for (std::int64_t k = 0; k < 5; ++k) {
    ASSERT_TRUE(solution.is(k, Status::kOptimal));
    EXPECT_EQ(solution.iterations[k], 0) << k;
    EXPECT_EQ(solution.active[k], 4);
    // s = (4 e_k - sum of the others) / 25
    EXPECT_NEAR(solution.norm[k], std::sqrt(20.0) / 25, 1e-15);
  }
}

// All active would take the multiplier -1.7e-10: small, but a sign.
TEST(ClosedForm, ASmallNegativeMultiplierIsNotRounding) {
  TestHead head{3, 2, {0, 0, -1, 0, -0.8, -0.6}, Values(9, 0.0)};
  head.margins[1] = 1;
  head.margins[2] = 0.8 - 1e-10;
  const TestSolution solution = solve(head);
  ASSERT_TRUE(solution.is(0, Status::kOptimal));
  EXPECT_EQ(solution.active[0], 1);
  EXPECT_NEAR(solution.norm[0], 1, 1e-14);
  head.margins[2] = 0.8;  // exactly zero up to rounding
  EXPECT_NEAR(solve(head).norm[0], 1, 1e-14);
}

}  // namespace
}  // namespace tacext
