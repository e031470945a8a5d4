#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <limits>
#include <optional>

#include "tacext/minimal_perturbation.h"
#include "test_support.h"

namespace tacext {
namespace {

using Eigen::MatrixXd;
using Eigen::VectorXd;
using test::solve;
using test::TestHead;
using test::TestSolution;

MatrixXd constraints(const TestHead& head, std::int64_t k, const std::vector<std::int64_t>& js) {
  MatrixXd rows(js.size(), head.latents);
  for (std::size_t i = 0; i < js.size(); ++i)
    for (std::int64_t d = 0; d < head.latents; ++d) rows(i, d) = head.constraint(k, js[i], d);
  return rows;
}

// The optimum of a small problem by trying every active set: the shortest s with equality on a set
// is A^T l, A A^T l = m; with l >= 0 and all other constraints holding it is the optimum (KKT).
std::optional<double> norm_by_enumeration(const TestHead& head, std::int64_t k) {
  std::vector<std::int64_t> others;
  for (std::int64_t j = 0; j < head.classes; ++j)
    if (j != k) others.push_back(j);
  const MatrixXd all = constraints(head, k, others);
  VectorXd margins(others.size());
  for (std::size_t i = 0; i < others.size(); ++i) margins[i] = head.margin(k, others[i]);
  for (unsigned set = 0; set < (1u << others.size()); ++set) {
    std::vector<int> active;
    for (std::size_t i = 0; i < others.size(); ++i)
      if (set >> i & 1) active.push_back(static_cast<int>(i));
    const MatrixXd a = all(active, Eigen::all);
    const MatrixXd gram = a * a.transpose();
    VectorXd s = VectorXd::Zero(head.latents);
    if (!active.empty()) {
      const Eigen::FullPivLU<MatrixXd> lu(gram);
      if (!lu.isInvertible()) continue;
      const VectorXd wanted = margins(active);
      const VectorXd multipliers = lu.solve(wanted);
      if (multipliers.minCoeff() < -1e-12) continue;
      s = a.transpose() * multipliers;
    }
    if ((all * s - margins).minCoeff() >= -1e-9) return s.norm();
  }
  return std::nullopt;
}

// The optimality conditions, straight from the inputs; `scale` is the metric.
void expect_optimal(const TestHead& head, const TestSolution& solution, std::int64_t row,
                    std::int64_t k, const double* scale = nullptr) {
  const double *const s = solution.s(row), *const l = solution.l(row);
  double energy = 0, longest = 0;
  test::Values rest(head.latents);
  for (std::int64_t d = 0; d < head.latents; ++d) {
    const double q = scale ? scale[d] : 1.0;
    energy += s[d] * s[d] / (q * q);
    rest[d] = s[d] / q;
  }
  EXPECT_NEAR(solution.norm[row], std::sqrt(energy), 1e-9 * std::sqrt(energy));
  EXPECT_EQ(l[k], 0);
  std::int64_t active = 0;
  for (std::int64_t j = 0; j < head.classes; ++j) {
    if (j == k) continue;
    double product = 0, length = 0;
    for (std::int64_t d = 0; d < head.latents; ++d) {
      const double q = scale ? scale[d] : 1.0, a = head.constraint(k, j, d);
      product += a * s[d];
      length += a * q * a * q;
      rest[d] -= l[j] * a * q;
    }
    longest = std::max(longest, std::sqrt(length));
    const double tolerance = 1e-8 * (std::fabs(head.margin(k, j)) + std::sqrt(length * energy));
    EXPECT_GE(product, head.margin(k, j) - tolerance) << "constraint " << j;
    EXPECT_GE(l[j], 0);
    active += l[j] > 0;
    if (l[j] > 0) {  // complementary slackness
      EXPECT_NEAR(product, head.margin(k, j), tolerance) << j;
    }
  }
  EXPECT_EQ(solution.active[row], active);
  double left = 0;
  for (double value : rest) left += value * value;
  EXPECT_LE(std::sqrt(left), 1e-8 * (std::sqrt(energy) + longest)) << "stationarity";
  EXPECT_LE(std::max({solution.primal[row], solution.dual[row], solution.gap[row]}), 1e-9);
}

// No s satisfies the constraints if sum_j l_j a_j = 0 although m.l > 0.
void expect_unreachable(const TestHead& head, const TestSolution& solution, std::int64_t row,
                        std::int64_t k) {
  EXPECT_EQ(solution.norm[row], HUGE_VAL);
  EXPECT_TRUE(std::isnan(solution.s(row)[0]));
  const double* const l = solution.l(row);
  double sum = 0, value = 0;
  for (std::int64_t j = 0; j < head.classes; ++j) {
    EXPECT_GE(l[j], 0);
    sum += l[j];
    value += j == k ? 0 : l[j] * head.margin(k, j);
  }
  EXPECT_NEAR(sum, 1, 1e-12);
  EXPECT_GT(value, 0);
  for (std::int64_t d = 0; d < head.latents; ++d) {
    double total = 0, size = 0;
    for (std::int64_t j = 0; j < head.classes; ++j) {
      total += l[j] * head.constraint(k, j, d);
      size += l[j] * std::fabs(head.constraint(k, j, d));
    }
    EXPECT_LE(std::fabs(total), 1e-11 * (1 + size));
  }
}

void expect_proven(const TestHead& head, const TestSolution& solution) {
  for (std::int64_t k = 0; k < head.classes; ++k) {
    SCOPED_TRACE(k);
    ASSERT_FALSE(solution.is(k, Status::kIterationLimit));
    if (solution.is(k, Status::kOptimal))
      expect_optimal(head, solution, k, k);
    else
      expect_unreachable(head, solution, k, k);
  }
}

TEST(MinimalPerturbation, EqualsEnumerationOnSmallHeads) {
  int reachable = 0, unreachable = 0;
  for (unsigned seed = 0; seed < 40; ++seed) {
    const std::int64_t classes = 2 + seed % 5, latents = 1 + seed / 5;
    const TestHead head = test::random_head(classes, latents, 12, seed);
    const TestSolution solution = solve(head);
    for (std::int64_t k = 0; k < classes; ++k) {
      SCOPED_TRACE(testing::Message() << "seed " << seed << ", class " << k);
      const std::optional<double> wanted = norm_by_enumeration(head, k);
      if (wanted) {
        ++reachable;
        ASSERT_TRUE(solution.is(k, Status::kOptimal));
        EXPECT_NEAR(solution.norm[k], *wanted, 1e-9 * *wanted);
      } else {
        ++unreachable;
        ASSERT_TRUE(solution.is(k, Status::kUnreachable));
        expect_unreachable(head, solution, k, k);
      }
    }
  }
  EXPECT_GT(reachable, 20);
  EXPECT_GT(unreachable, 5);
}

TEST(MinimalPerturbation, ProvesEveryClassOfVariousHeads) {
  for (const test::NamedHead& named : test::various_heads()) {
    SCOPED_TRACE(named.name);
    expect_proven(named.head, solve(named.head));
  }
}

TEST(MinimalPerturbation, ClosedFormChangesNothingButTheSteps) {
  const TestHead head = test::random_head(8, 60, 200, 30);
  const TestSolution closed = solve(head), stepped = solve(head, {1e-9, 0, false});
  for (std::int64_t k = 0; k < head.classes; ++k) {
    EXPECT_GT(stepped.iterations[k], 0);
    EXPECT_NEAR(closed.norm[k], stepped.norm[k], 1e-10 * closed.norm[k]);
  }
  EXPECT_TRUE(std::count(closed.iterations.begin(), closed.iterations.end(), 0) > 0)
      << "a head on which the closed form never holds tests nothing";
}

TEST(MinimalPerturbation, TwoClassesHaveAFormula) {
  const TestHead head = test::random_head(2, 7, 20, 31);
  const TestSolution solution = solve(head);
  for (std::int64_t k : {0, 1}) {
    double squared = 0;
    for (std::int64_t d = 0; d < 7; ++d) squared += std::pow(head.constraint(k, 1 - k, d), 2);
    EXPECT_NEAR(solution.norm[k], std::max(0.0, head.margin(k, 1 - k)) / std::sqrt(squared), 1e-13);
  }
}

TEST(MinimalPerturbation, NothingToDoWhereAllMarginsHold) {
  TestHead head = test::random_head(6, 9, 10, 32);
  for (std::int64_t j = 0; j < 6; ++j) head.margins[2 * 6 + j] = -1.0 - j;
  const TestSolution solution = solve(head);
  ASSERT_TRUE(solution.is(2, Status::kOptimal));
  EXPECT_EQ(solution.norm[2], 0);
  EXPECT_EQ(solution.active[2], 0);
  EXPECT_EQ(test::Values(solution.s(2), solution.s(2) + 9), test::Values(9, 0.0));
}

TEST(MinimalPerturbation, ScaleIsAMetric) {
  const TestHead head = test::random_head(9, 12, 30, 33);
  test::Values scale = test::normal_values(12, 34);
  for (double& value : scale) value = 0.1 + std::fabs(value);
  const TestSolution scaled = solve(head, {}, scale.data());
  TestHead rescaled = head;
  for (std::int64_t j = 0; j < 9; ++j)
    for (std::int64_t d = 0; d < 12; ++d) rescaled.weight[j * 12 + d] *= scale[d];
  const TestSolution plain = solve(rescaled);
  for (std::int64_t k = 0; k < 9; ++k) {
    SCOPED_TRACE(k);
    ASSERT_TRUE(scaled.is(k, Status::kOptimal));
    expect_optimal(head, scaled, k, k, scale.data());
    EXPECT_NEAR(scaled.norm[k], plain.norm[k], 1e-10 * plain.norm[k]);
  }
}

TEST(MinimalPerturbation, EqualRowsAreUnreachableOnlyAgainstEachOther) {
  for (const test::NamedHead& named : test::various_heads()) {
    if (std::string(named.name) != "duplicated row") continue;
    TestHead head = named.head;
    head.margins[2 * 9 + 6] = 0.5;  // class 2 must beat its twin 6 by 0.5, and cannot
    head.margins[6 * 9 + 2] = -0.5;
    const TestSolution solution = solve(head);
    ASSERT_TRUE(solution.is(2, Status::kUnreachable));
    expect_unreachable(head, solution, 2, 2);
    EXPECT_EQ(solution.l(2)[6], 1);
    EXPECT_TRUE(solution.is(6, Status::kOptimal));
    EXPECT_TRUE(solution.is(0, Status::kOptimal));
  }
}

TEST(MinimalPerturbation, AClassInsideTheHullOfOthersIsUnreachable) {
  TestHead head{4, 2, {1, 0, -1, 1, -1, -1, 0, 0}, test::Values(16, 1.0)};
  const TestSolution solution = solve(head);
  ASSERT_TRUE(solution.is(3, Status::kUnreachable));
  expect_unreachable(head, solution, 3, 3);
  for (std::int64_t k : {0, 1, 2}) EXPECT_TRUE(solution.is(k, Status::kOptimal));
}

TEST(MinimalPerturbation, StopsAtTheIterationLimit) {
  const TestHead head = test::random_head(30, 40, 60, 35);
  const TestSolution solution = solve(head, {1e-9, 1, false});
  EXPECT_TRUE(std::count(solution.status.begin(), solution.status.end(),
                         static_cast<std::int32_t>(Status::kIterationLimit)) > 0);
  for (std::int64_t k = 0; k < head.classes; ++k) {
    if (!solution.is(k, Status::kIterationLimit)) continue;
    EXPECT_GT(std::max({solution.primal[k], solution.dual[k], solution.gap[k]}), 1e-9);
  }
}

// Squares of such weights overflow: whatever comes out, it must not count as proven.
TEST(MinimalPerturbation, AnOverflowProvesNothing) {
  for (bool closed_form : {true, false}) {
    TestHead head = test::random_head(6, 8, 20, 37);
    for (std::int64_t d = 0; d < 8; ++d) head.weight[4 * 8 + d] *= 1e160;
    const TestSolution solution = solve(head, {1e-9, 0, closed_form});
    EXPECT_TRUE(solution.is(4, Status::kIterationLimit));
    EXPECT_GT(std::max({solution.primal[4], solution.dual[4], solution.gap[4]}), 1e-9);
    for (std::int64_t k = 0; k < 6; ++k) {
      // The others may do without the huge row, whose products still fit into a double.
      if (!solution.is(k, Status::kOptimal)) continue;
      EXPECT_EQ(solution.l(k)[4], 0);
      for (std::int64_t j = 0; j < 6; ++j) {
        long double product = 0;
        for (std::int64_t d = 0; d < 8; ++d)
          product += (static_cast<long double>(head.weight[k * 8 + d]) - head.weight[j * 8 + d]) *
                     solution.s(k)[d];
        const double margin = head.margins[k * 6 + j];
        EXPECT_GE(product, margin - 1e-9 * std::fabs(margin)) << k << " " << j;
      }
    }
  }
}

TEST(MinimalPerturbation, TheDiagonalIsNotRead) {
  TestHead head = test::random_head(7, 9, 20, 36);
  const TestSolution before = solve(head);
  for (std::int64_t k = 0; k < 7; ++k) head.margins[k * 8] = 123;
  EXPECT_EQ(solve(head).perturbation, before.perturbation);
}

}  // namespace
}  // namespace tacext
