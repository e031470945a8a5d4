#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <numeric>

#include "candidate_block.h"
#include "test_support.h"

// Constraints here are the rows a_j of a plain matrix A, with margins m: min |s|, A s >= m.
namespace tacext {
namespace {

using Eigen::MatrixXd;
using Eigen::VectorXd;

struct Constraints {
  MatrixXd rows;
  VectorXd margins;

  CandidateBlock block(ActiveFactor& factor, const ActiveSet& set,
                       std::vector<std::int64_t> constraints) const {
    return {factor, set.active, std::move(constraints),
            [this](std::int64_t i, std::int64_t j) { return rows.row(i).dot(rows.row(j)); }};
  }
  /// m - A s of the set's s.
  VectorXd slack(const ActiveSet& set) const {
    VectorXd s = VectorXd::Zero(rows.cols());
    for (std::size_t i = 0; i < set.active.size(); ++i)
      s += set.multipliers[i] * rows.row(set.active[i]).transpose();
    return margins - rows * s;
  }
  Ending add_in_turn(CandidateBlock block, ActiveSet& set, std::int64_t most = 1000) const {
    const VectorXd left = slack(set), rounding = VectorXd::Constant(margins.size(), 1.0);
    return block.add_in_turn(margins.data(), left.data(), rounding.data(), most, set);
  }
};

/// Random rows that share a component: in many latents and without it nearly all become active.
Constraints random_constraints(std::int64_t count, std::int64_t latents, double common,
                               unsigned seed) {
  const test::Values values = test::normal_values(count * latents, seed);
  Constraints c{Eigen::Map<const MatrixXd>(values.data(), count, latents), VectorXd::Ones(count)};
  c.rows.col(0).array() += common;
  return c;
}

std::vector<std::int64_t> range(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(end - begin));
  std::iota(all.begin(), all.end(), begin);
  return all;
}

std::vector<std::int64_t> sorted(std::vector<std::int64_t> values) {
  std::sort(values.begin(), values.end());
  return values;
}

/// L L^T is the active Gram matrix, z is L^-1 m, and exactly the active constraints hold.
void expect_consistent(const Constraints& c, const ActiveFactor& factor, const ActiveSet& set) {
  const auto size = static_cast<std::int64_t>(set.active.size());
  ASSERT_EQ(factor.size(), size);
  ASSERT_EQ(static_cast<std::int64_t>(factor.z.size()), size);
  ASSERT_EQ(static_cast<std::int64_t>(set.multipliers.size()), size);
  const VectorXd slack = c.slack(set);
  for (std::int64_t i = 0; i < size; ++i) {
    double z = 0;
    for (std::int64_t j = 0; j <= i; ++j) {
      double product = 0;
      for (std::int64_t d = 0; d <= j; ++d)
        product += factor.lower.row(i)[d] * factor.lower.row(j)[d];
      const double wanted = c.rows.row(set.active[i]).dot(c.rows.row(set.active[j]));
      EXPECT_NEAR(product, wanted, 1e-11 * c.rows.squaredNorm());
      z += factor.lower.row(i)[j] * factor.z[j];
    }
    EXPECT_NEAR(z, c.margins[set.active[i]], 1e-10);
    EXPECT_GE(set.multipliers[i], 0);
    EXPECT_NEAR(slack[set.active[i]], 0, 1e-10);
  }
}

TEST(CandidateBlock, TogetherEqualsInTurn) {
  for (const std::int64_t size : {1, 3, 4, 31, 32, 33, 70}) {
    SCOPED_TRACE(size);
    const Constraints c = random_constraints(size + 40, 1000, 0, static_cast<unsigned>(size));
    ActiveFactor together, in_turn;
    ActiveSet left, right;
    for (const auto& constraints : {range(0, 40), range(40, 40 + size)}) {
      ASSERT_TRUE(c.block(together, left, constraints).add_together(c.margins.data(), 1000, left));
      ASSERT_EQ(c.add_in_turn(c.block(in_turn, right, constraints), right), Ending::kSolved);
    }
    expect_consistent(c, together, left);
    expect_consistent(c, in_turn, right);
    EXPECT_EQ(left.iterations, static_cast<std::int64_t>(left.active.size()));
    EXPECT_GT(left.active.size(), 40u * 3 / 4);
    // Both are optimal for their own active constraints; in turn, none of those tried is violated.
    EXPECT_LT(c.slack(right).head(40 + size).maxCoeff(), 1e-9);
    const VectorXd rest = c.slack(left);
    if (rest.maxCoeff() < 1e-9) {
      EXPECT_EQ(sorted(left.active), sorted(right.active));
    }
  }
}

TEST(CandidateBlock, TogetherLeavesOutWhatDependsOrTurnsNegative) {
  Constraints c{MatrixXd::Identity(6, 6), VectorXd::Ones(6)};
  c.rows.row(2) = c.rows.row(1);                        // the same constraint again
  c.rows.row(3) = c.rows.row(0) + 0.1 * c.rows.row(4);  // m = 1 there holds once 0 and 4 do
  ActiveFactor factor;
  ActiveSet set;
  ASSERT_TRUE(c.block(factor, set, {0, 1, 2, 4, 3}).add_together(c.margins.data(), 10, set));
  EXPECT_EQ(sorted(set.active), (std::vector<std::int64_t>{0, 1, 4}));
  expect_consistent(c, factor, set);
}

// Leaving out one negative multiplier makes another negative: up to six attempts here.
TEST(CandidateBlock, TogetherLeavesOutAgainAndAgain) {
  for (const double common : {10.0, 20.0, 30.0})
    for (const std::int64_t size : {8, 32, 60})
      for (unsigned seed = 0; seed < 6; ++seed) {
        SCOPED_TRACE(testing::Message() << common << " " << size << " " << seed);
        Constraints c = random_constraints(size, 200, common, seed);
        const test::Values noise = test::normal_values(size, seed + 50, 0.3);
        for (std::int64_t i = 0; i < size; ++i) c.margins[i] += noise[i];
        ActiveFactor factor;
        ActiveSet set;
        ASSERT_TRUE(c.block(factor, set, range(0, size)).add_together(c.margins.data(), 100, set));
        expect_consistent(c, factor, set);
      }
}

// A sum of the others is dependent although rounding leaves it a tiny pivot.
TEST(CandidateBlock, TogetherLeavesOutWhatDependsToRounding) {
  int tiny = 0;
  for (unsigned seed = 0; seed < 40; ++seed) {
    Constraints c = random_constraints(5, 20, 0, seed);
    c.rows.row(4) = 0.1 * c.rows.row(0) + 0.7 * c.rows.row(1) + 0.3 * c.rows.row(3);
    c.margins[4] = 1.1 + 1e-9;  // a little more than its parts give
    ActiveFactor factor;
    ActiveSet set;
    if (!c.block(factor, set, range(0, 5)).add_together(c.margins.data(), 10, set)) continue;
    ++tiny;
    EXPECT_EQ(std::count(set.active.begin(), set.active.end(), 4), 0) << seed;
    expect_consistent(c, factor, set);
  }
  EXPECT_GT(tiny, 20);
}

TEST(CandidateBlock, TogetherLeavesAllAsItWasWhereAnActiveOneMustGo) {
  Constraints c{MatrixXd{{1, 0}, {2, 1}}, VectorXd{{1, 9}}};  // the second makes the first slack
  ActiveFactor factor;
  ActiveSet set;
  ASSERT_TRUE(c.block(factor, set, {0}).add_together(c.margins.data(), 10, set));
  CandidateBlock block = c.block(factor, set, {1});
  EXPECT_FALSE(block.add_together(c.margins.data(), 10, set));
  EXPECT_EQ(set.active, std::vector<std::int64_t>{0});
  EXPECT_EQ(set.iterations, 1);
  expect_consistent(c, factor, set);
  ASSERT_EQ(c.add_in_turn(block, set), Ending::kSolved);  // and in turn it goes
  EXPECT_EQ(set.active, std::vector<std::int64_t>{1});
  expect_consistent(c, factor, set);
}

TEST(CandidateBlock, TogetherTakesNoMoreThanAllowed) {
  const Constraints c = random_constraints(20, 300, 0, 3);
  ActiveFactor factor;
  ActiveSet set;
  ASSERT_TRUE(c.block(factor, set, range(0, 20)).add_together(c.margins.data(), 5, set));
  EXPECT_EQ(set.active.size(), 5u);
  EXPECT_EQ(set.iterations, 5);
  EXPECT_FALSE(c.block(factor, set, {9}).add_together(c.margins.data(), 0, set));
}

TEST(CandidateBlock, InTurnDropsWhatTurnsNegative) {
  std::int64_t dropped = 0;
  for (unsigned seed = 0; seed < 10; ++seed) {
    SCOPED_TRACE(seed);
    const Constraints c = random_constraints(90, 60, 1.5, seed);
    ActiveFactor factor;
    ActiveSet set;
    for (std::int64_t begin = 0; begin < 90; begin += 30) {
      ASSERT_EQ(c.add_in_turn(c.block(factor, set, range(begin, begin + 30)), set),
                Ending::kSolved);
      expect_consistent(c, factor, set);
      EXPECT_LT(c.slack(set).segment(begin, 30).maxCoeff(), 1e-9);
    }
    dropped += set.iterations - static_cast<std::int64_t>(set.active.size());
  }
  EXPECT_GT(dropped, 20) << "a case in which nothing leaves tests no removal";
}

TEST(CandidateBlock, InTurnProvesWhatIsUnreachable) {
  const Constraints c{MatrixXd{{1, 0}, {0, 1}, {-1, -2}}, VectorXd::Ones(3)};
  ActiveFactor factor;
  ActiveSet set;
  EXPECT_EQ(c.add_in_turn(c.block(factor, set, {0, 1, 2}), set), Ending::kUnreachable);
  VectorXd sum = VectorXd::Zero(2);
  for (std::size_t i = 0; i < set.active.size(); ++i)
    sum += set.multipliers[i] * c.rows.row(set.active[i]).transpose();
  EXPECT_LT(sum.norm(), 1e-15);
}

TEST(CandidateBlock, TogetherLeavesOutWhatIsNoNumber) {
  Constraints c = random_constraints(4, 30, 0, 7);
  c.rows(2, 0) = std::numeric_limits<double>::quiet_NaN();
  ActiveFactor factor;
  ActiveSet set;
  ASSERT_TRUE(c.block(factor, set, range(0, 4)).add_together(c.margins.data(), 10, set));
  EXPECT_EQ(set.active, (std::vector<std::int64_t>{0, 1, 3}));
}

/// Products that overflowed, as `satisfy` meets them.
struct Overflowed {
  static constexpr double kDependent = 1e-12;
  double curvature, gap;
  bool touched = false;

  double project(std::int64_t, std::vector<double>& coefficients) const {
    coefficients.clear();
    return curvature;
  }
  double slack(std::int64_t) const { return gap; }
  double squared_length(std::int64_t) const { return 1; }
  std::int64_t constraint(std::int64_t p) const { return p; }
  void advance(double) { touched = true; }
  void append_projected() { touched = true; }
  void remove(std::int64_t) { touched = true; }
};

TEST(Satisfy, TakesNoStepThatIsNoNumber) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  for (const double gap : {kNaN, HUGE_VAL, -HUGE_VAL}) {
    Overflowed geometry{1.0, gap};
    ActiveSet set;
    EXPECT_EQ(satisfy(geometry, 0, 10, set), Ending::kIterationLimit) << gap;
    EXPECT_FALSE(geometry.touched);
  }
  Overflowed geometry{kNaN, 1.0};  // an unknown curvature counts as none: a ray, to be certified
  ActiveSet set;
  EXPECT_EQ(satisfy(geometry, 0, 10, set), Ending::kUnreachable);
  EXPECT_FALSE(geometry.touched);
}

TEST(CandidateBlock, InTurnStopsAtTheIterationLimit) {
  const Constraints c = random_constraints(20, 300, 0, 4);
  ActiveFactor factor;
  ActiveSet set;
  EXPECT_EQ(c.add_in_turn(c.block(factor, set, range(0, 20)), set, 4), Ending::kIterationLimit);
  EXPECT_EQ(set.iterations, 4);
  expect_consistent(c, factor, set);
}

}  // namespace
}  // namespace tacext
