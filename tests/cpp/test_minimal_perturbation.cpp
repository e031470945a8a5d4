#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <limits>
#include <optional>
#include <stdexcept>

#include "tacext/minimal_perturbation.h"
#include "test_support.h"

namespace tacext {
namespace {

using Eigen::MatrixXd;
using Eigen::VectorXd;
using test::expect_unreachable;
using test::huge_and_small_rows;
using test::solve;
using test::TestHead;
using test::TestSolution;
using test::Values;
using test::violation_of;

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

TEST(MinimalPerturbation, ARayIsInTheUnitOfTheMargins) {
  TestHead head{4, 2, {1, 0, -1, 1, -1, -1, 0, 0}, Values(16, 1.0)};
  for (const double unit : {1e-200, 3.0, 1e200}) {
    for (double& margin : head.margins) margin = unit;
    const TestSolution solution = solve(head);
    ASSERT_TRUE(solution.is(3, Status::kUnreachable));
    expect_unreachable(head, solution, 3, 3);
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

// Most rows huge and alike: what is certified must be the small rows themselves.
TEST(MinimalPerturbation, HugeRowsDoNotBlurSmallOnes) {
  for (const double huge : {1e8, 1e12, 1e16}) {
    SCOPED_TRACE(huge);
    const TestHead head = huge_and_small_rows(huge);
    const TestSolution solution = solve(head);
    ASSERT_TRUE(solution.is(9, Status::kOptimal));
    EXPECT_NEAR(solution.norm[9], std::sqrt(10.0), 1e-14);
    EXPECT_LE(violation_of(head, solution, 9).violation, 1e-15);
  }
}

TestHead clustered_head(std::int64_t classes, std::int64_t latents, double apart, unsigned seed) {
  TestHead head{classes, latents, test::normal_values(classes * latents, seed, apart), {}};
  for (std::int64_t j = 0; j < classes; ++j)
    for (std::int64_t d = 0; d < latents; ++d) head.weight[j * latents + d] += j % 2 ? 1 : -1;
  head.margins = test::random_margins(head.weight, classes, latents, 100, seed + 1000);
  return head;
}

// Rows in two tight clusters: products of the rows themselves say nothing about differences within
// a cluster. Nothing may come and go for their rounding, and no residual may be lost in it.
TEST(MinimalPerturbation, TightClustersNeitherCycleNorHideViolations) {
  for (const double apart : {1e-5, 1e-6, 3e-7, 1e-7, 1e-8})
    for (unsigned seed = 0; seed < 25; ++seed) {
      SCOPED_TRACE(testing::Message() << apart << ", seed " << seed);
      const TestHead head = clustered_head(20, 10, apart, seed);
      const TestSolution solution = solve(head);
      for (std::int64_t k = 0; k < head.classes; ++k) {
        ASSERT_FALSE(solution.is(k, Status::kIterationLimit)) << k;
        EXPECT_LE(solution.iterations[k], 200) << k;
        if (solution.is(k, Status::kOptimal)) {
          EXPECT_LE(violation_of(head, solution, k).relative, 1.01 * solution.primal[k] + 1e-12)
              << k;
        }
      }
    }
}

TEST(MinimalPerturbation, WithoutAnAnswerThereIsNoNorm) {
  TestHead head = test::random_head(6, 8, 20, 37);
  for (std::int64_t d = 0; d < 8; ++d) head.weight[4 * 8 + d] *= 1e160;
  const TestSolution solution = solve(head);
  ASSERT_TRUE(solution.is(4, Status::kIterationLimit));
  EXPECT_TRUE(std::isnan(solution.norm[4]));
  EXPECT_TRUE(std::isnan(solution.s(4)[0]));
}

// Rows and margins whose products overflow: every class ends, and the sanitizers see no write
// elsewhere.
TEST(MinimalPerturbation, FiniteInputsOfAnySizeEnd) {
  const double sizes[] = {1, 1, 1, 1, 1e100, 1e100, 1e140, 1e150, 1e153, 1e153};
  for (const unsigned seed : {13, 25, 117, 133}) {
    TestHead head{40, 28, test::normal_values(40 * 28, seed),
                  test::normal_values(40 * 40, seed + 1, 1e150)};
    std::mt19937 engine(seed);
    for (std::int64_t j = 0; j < 40; ++j) {
      const double size = sizes[engine() % 10];
      for (std::int64_t d = 0; d < 28; ++d) head.weight[j * 28 + d] *= size;
    }
    const TestSolution solution = solve(head);
    for (std::int64_t k = 0; k < 40; ++k) {
      if (!solution.is(k, Status::kOptimal)) continue;
      EXPECT_TRUE(std::isfinite(solution.norm[k])) << seed << " " << k;
      EXPECT_LE(violation_of(head, solution, k).relative, 1e-9L) << seed << " " << k;
    }
  }
}

TEST(MinimalPerturbation, ProblemsThatAreNoneAreRefused) {
  const TestHead head = test::random_head(4, 3, 5, 63);
  TestSolution solution(4, 4, 3);
  const auto refused = [&](std::int64_t classes, std::int64_t latents, double tolerance) {
    const PerturbationProblem problem{
        head.weight.data(), head.margins.data(), nullptr, nullptr, classes, classes, latents};
    EXPECT_THROW(minimal_perturbation(problem, {tolerance}, solution.pointers(), serial_for),
                 std::invalid_argument);
  };
  refused(1, 3, 1e-9);
  refused(4, 0, 1e-9);
  for (const double tolerance : {0.0, -1e-9, 1.0, HUGE_VAL, std::nan("")}) refused(4, 3, tolerance);
}

// Whatever a caller did not check: every class ends, and none that a NaN concerns is proven.
TEST(MinimalPerturbation, ANaNProvesNothing) {
  for (const bool closed_form : {true, false}) {
    TestHead head = test::random_head(6, 8, 20, 38);
    head.margins[2 * 6 + 3] = std::nan("");
    TestSolution solution = solve(head, {1e-9, 0, closed_form});
    EXPECT_TRUE(solution.is(2, Status::kIterationLimit));
    EXPECT_GT(solution.norm[2], 0) << "the other constraints still have an answer";
    EXPECT_TRUE(solution.is(1, Status::kOptimal));
    head.weight[4 * 8 + 1] = std::nan("");
    solution = solve(head, {1e-9, 0, closed_form});
    for (std::int64_t k = 0; k < 6; ++k) EXPECT_TRUE(solution.is(k, Status::kIterationLimit)) << k;
  }
}

TEST(MinimalPerturbation, MarginsComeInOneType) {
  const TestHead head = test::random_head(4, 3, 5, 63);
  TestSolution solution(4, 4, 3);
  const std::vector<float> single(16, 1.0f);
  PerturbationProblem problem{head.weight.data(), nullptr, nullptr, nullptr, 4, 4, 3};
  EXPECT_THROW(minimal_perturbation(problem, {}, solution.pointers(), serial_for),
               std::invalid_argument);
  problem.margins = head.margins.data();
  problem.margins_single = single.data();
  EXPECT_THROW(minimal_perturbation(problem, {}, solution.pointers(), serial_for),
               std::invalid_argument);
}

TEST(MinimalPerturbation, TheDiagonalIsNotRead) {
  TestHead head = test::random_head(7, 9, 20, 36);
  const TestSolution before = solve(head);
  for (std::int64_t k = 0; k < 7; ++k) head.margins[k * 8] = 123;
  EXPECT_EQ(solve(head).perturbation, before.perturbation);
}

}  // namespace
}  // namespace tacext
