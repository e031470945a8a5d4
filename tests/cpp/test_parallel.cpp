#include <gtest/gtest.h>

#include <limits>

#include "tacext/neuron_scores.h"
#include "tacext/pairwise_margin_max.h"
#include "test_support.h"

// The promise of tacext/parallel.h: how a range is cut changes no bit of any result.
namespace tacext {
namespace {

using test::TestHead;
using test::TestSolution;

template <class T>
void expect_same_bits(const std::vector<T>& a, const std::vector<T>& b, const char* what) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(T)), 0) << what;
}

void expect_same_bits(const TestSolution& a, const TestSolution& b) {
  expect_same_bits(a.perturbation, b.perturbation, "perturbation");
  expect_same_bits(a.norm, b.norm, "norm");
  expect_same_bits(a.multipliers, b.multipliers, "multipliers");
  expect_same_bits(a.status, b.status, "status");
  expect_same_bits(a.iterations, b.iterations, "iterations");
  expect_same_bits(a.active, b.active, "active");
  expect_same_bits(a.primal, b.primal, "primal residual");
  expect_same_bits(a.dual, b.dual, "dual residual");
  expect_same_bits(a.gap, b.gap, "gap");
}

TEST(Parallel, TheOddCutsCoverEveryRangeOnce) {
  for (std::int64_t count : {0, 1, 2, 3, 10, 101}) {
    std::vector<int> visits(count, 0);
    test::odd_threads(count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) ++visits[i];
    });
    EXPECT_EQ(visits, std::vector<int>(count, 1));
  }
}

TEST(Parallel, MarginsHaveTheSameBits) {
  const std::int64_t samples = 77, classes = 61;
  const auto logits = test::as_elements<float>(test::normal_values(samples * classes, 1));
  std::vector<float> serial(classes * classes, -std::numeric_limits<float>::infinity());
  std::vector<float> threaded = serial;
  pairwise_margin_max(logits.data(), samples, classes, serial.data(), serial_for);
  pairwise_margin_max(logits.data(), samples, classes, threaded.data(), test::odd_threads);
  expect_same_bits(serial, threaded, "margins");
}

TEST(Parallel, ScoresHaveTheSameBits) {
  for (std::int64_t positions : {1, 30}) {
    const std::int64_t samples = 12, channels = 45;
    const auto a = test::as_elements<float>(test::normal_values(samples * channels * positions, 1));
    const auto g = test::as_elements<float>(test::normal_values(samples * channels * positions, 2));
    std::vector<double> serial(channels), threaded(channels);
    neuron_scores(a.data(), g.data(), samples, channels, positions, serial.data(), serial_for);
    neuron_scores(a.data(), g.data(), samples, channels, positions, threaded.data(),
                  test::odd_threads);
    expect_same_bits(serial, threaded, "scores");
  }
}

TEST(Parallel, PerturbationsHaveTheSameBits) {
  for (const test::NamedHead& named : test::various_heads()) {
    SCOPED_TRACE(named.name);
    expect_same_bits(test::solve(named.head),
                     test::solve(named.head, {}, nullptr, nullptr, test::odd_threads));
  }
  const TestHead large = test::random_head(120, 40, 160, 20);  // several batches of classes
  expect_same_bits(test::solve(large), test::solve(large, {}, nullptr, nullptr, test::odd_threads));
}

TEST(Parallel, AClassDoesNotDependOnTheOthersListed) {
  const TestHead head = test::random_head(70, 30, 90, 21);
  const TestSolution all = test::solve(head);
  const std::vector<std::int64_t> targets{69, 3, 3, 0, 41};
  const TestSolution some = test::solve(head, {}, nullptr, &targets);
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const std::int64_t row = static_cast<std::int64_t>(i);
    EXPECT_EQ(std::memcmp(some.s(row), all.s(targets[i]), 30 * sizeof(double)), 0) << i;
    EXPECT_EQ(some.norm[i], all.norm[targets[i]]);
    EXPECT_EQ(some.iterations[i], all.iterations[targets[i]]);
  }
}

}  // namespace
}  // namespace tacext
