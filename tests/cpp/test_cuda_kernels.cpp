#include <gtest/gtest.h>

#include <limits>

#include "cuda_test_support.h"
#include "tacext/neuron_scores.h"
#include "tacext/pairwise_margin_max.h"
#include "test_support.h"

// The kernels themselves, run on the host (see cuda_on_host/cuda_runtime.h), against the core.
namespace tacext {
namespace {

using test::huge_and_small_rows;
using test::in_both_orders;
using test::kType;
using test::TestHead;
using test::TestSolution;
using test::Values;

template <class T>
using MarginOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class T>
std::vector<MarginOf<T>> margins_of(const std::vector<T>& logits, std::int64_t classes,
                                    const std::vector<MarginOf<T>>& initial) {
  return in_both_orders<std::vector<MarginOf<T>>>([&] {
    std::vector<MarginOf<T>> margins = initial;
    const std::int64_t samples = static_cast<std::int64_t>(logits.size()) / classes;
    EXPECT_EQ(tacext_cuda_pairwise_margin_max(logits.data(), kType<T>, samples, classes,
                                              margins.data(), nullptr),
              0);
    return margins;
  });
}

template <class T>
class CudaKernels : public testing::Test {};
using Elements = testing::Types<float, double, Half, BFloat16>;
TYPED_TEST_SUITE(CudaKernels, Elements);

TYPED_TEST(CudaKernels, MarginsEqualTheCores) {
  // Every tile size, tiles beside the diagonal and on it, and samples that are split over blocks
  // (from 256 on).
  for (const auto& [classes, samples] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{1, 3},
                                                          {2, 300},
                                                          {10, 1000},
                                                          {16, 17},
                                                          {17, 33},
                                                          {32, 5},
                                                          {33, 300},
                                                          {64, 19},
                                                          {65, 300},
                                                          {90, 20},
                                                          {130, 260},
                                                          {515, 3}}) {
    const auto logits = test::as_elements<TypeParam>(test::normal_values(samples * classes, 1, 10));
    std::vector<MarginOf<TypeParam>> wanted(classes * classes, -kInfinity);
    wanted[classes * classes / 2] = 1000;  // what is already there counts
    const auto got = margins_of(logits, classes, wanted);
    pairwise_margin_max(logits.data(), samples, classes, wanted.data(), serial_for);
    ASSERT_EQ(got, wanted) << classes << " classes, " << samples << " samples";
  }
}

TYPED_TEST(CudaKernels, ScoresEqualTheCores) {
  struct Sizes {
    std::int64_t samples, channels, positions;
  };
  for (const Sizes& n :
       {Sizes{1, 1, 1}, Sizes{70, 5, 1}, Sizes{500, 33, 1}, Sizes{300, 3, 4}, Sizes{9, 4, 32},
        Sizes{50, 3, 49}, Sizes{5, 2, 256}, Sizes{3, 2, 1025}, Sizes{100, 2, 300}}) {
    const std::int64_t count = n.samples * n.channels * n.positions;
    const auto a = test::as_elements<TypeParam>(test::normal_values(count, 1));
    const auto g = test::as_elements<TypeParam>(test::normal_values(count, 2));
    Values wanted(n.channels);
    neuron_scores(a.data(), g.data(), n.samples, n.channels, n.positions, wanted.data(),
                  serial_for);
    const Values got = in_both_orders<Values>([&] {
      Values workspace(tacext_cuda_neuron_scores_workspace(n.samples, n.channels, n.positions));
      Values scores(n.channels, 99.0);
      EXPECT_EQ(
          tacext_cuda_neuron_scores(a.data(), g.data(), kType<TypeParam>, n.samples, n.channels,
                                    n.positions, scores.data(), workspace.data(), nullptr),
          0);
      return scores;
    });
    for (std::int64_t c = 0; c < n.channels; ++c)
      EXPECT_NEAR(got[c], wanted[c], 1e-13 * n.positions)
          << n.samples << " x " << n.channels << " x " << n.positions;
  }
}

template <class T>
void expect_nan_in_cross(std::int64_t classes, std::int64_t samples, std::int64_t bad_class,
                         float bad) {
  auto logits = test::as_elements<T>(test::normal_values(samples * classes, 3));
  logits[samples / 2 * classes + bad_class] = bad;
  const auto got =
      margins_of(logits, classes, std::vector<MarginOf<T>>(classes * classes, -kInfinity));
  for (std::int64_t k = 0; k < classes; ++k)
    for (std::int64_t j = 0; j < classes; ++j)
      ASSERT_EQ(std::isnan(got[k * classes + j]), k == bad_class || j == bad_class)
          << "[" << k << ", " << j << "] of " << classes << " classes, " << samples << " samples";
}

TEST(CudaMargins, ANaNLogitSpoilsItsRowAndColumn) {
  for (float bad : {kNaN, -kNaN})
    for (std::int64_t samples : {5, 600}) {
      expect_nan_in_cross<float>(7, samples, 3, bad);
      expect_nan_in_cross<double>(7, samples, 6, bad);
      expect_nan_in_cross<float>(40, samples, 0, bad);
      expect_nan_in_cross<float>(70, samples, 2, bad);  // a tile and its mirror image
      expect_nan_in_cross<float>(70, samples, 69, bad);
      expect_nan_in_cross<double>(70, samples, 69, bad);
    }
}

TEST(CudaMargins, NaNsOfEarlierBatchesStay) {
  for (float bad : {kNaN, -kNaN})
    for (std::int64_t samples : {5, 600}) {
      std::vector<float> initial(9, -kInfinity);
      initial[5] = bad;
      const auto logits = test::as_elements<float>(test::normal_values(samples * 3, 4));
      const auto got = margins_of(logits, 3, initial);
      for (std::size_t i = 0; i < got.size(); ++i) EXPECT_EQ(std::isnan(got[i]), i == 5) << i;
    }
}

// z_j - z_k and its negative meet the same rounding, and no zero keeps a sign.
TEST(CudaMargins, TheMirrorImageHasTheBitsOfItsOwnDifferences) {
  const std::int64_t classes = 70;
  for (std::int64_t samples : {1, 300}) {
    std::vector<float> logits(samples * classes);
    const Values values = test::normal_values(samples * classes, 6, 1e-3);
    for (std::size_t i = 0; i < logits.size(); ++i)
      logits[i] = i % 3 == 0 ? -0.0f : static_cast<float>(values[i]) + (i % 5 == 0 ? 1e4f : 0.0f);
    const auto got = margins_of(logits, classes, std::vector<float>(classes * classes, -kInfinity));
    for (std::int64_t k = 0; k < classes; ++k)
      for (std::int64_t j = 0; j < classes; ++j) {
        float wanted = -kInfinity;
        for (std::int64_t i = 0; i < samples; ++i)
          wanted = std::max(wanted, logits[i * classes + j] - logits[i * classes + k]);
        const float entry = got[k * classes + j];
        ASSERT_EQ(entry, wanted);
        ASSERT_FALSE(entry == 0 && std::signbit(entry));
      }
  }
}

TEST(CudaMargins, InfinitiesSubtractAsFloatsDo) {
  const std::int64_t classes = 70;
  std::vector<float> logits(classes, 0.0f);
  logits[1] = kInfinity;
  logits[69] = -kInfinity;
  const auto got = margins_of(logits, classes, std::vector<float>(classes * classes, -kInfinity));
  const auto margin = [&](std::int64_t k, std::int64_t j) { return got[k * classes + j]; };
  EXPECT_EQ(margin(69, 1), kInfinity);
  EXPECT_EQ(margin(1, 69), -kInfinity);
  EXPECT_EQ(margin(0, 1), kInfinity);
  EXPECT_EQ(margin(69, 0), kInfinity);
  EXPECT_TRUE(std::isnan(margin(1, 1)) && std::isnan(margin(69, 69)));
  EXPECT_EQ(margin(5, 66), 0.0f);
}

TEST(CudaMargins, NothingHappensWithoutSamplesOrClasses) {
  std::vector<float> margins(9, 5.0f);
  EXPECT_EQ(
      tacext_cuda_pairwise_margin_max(nullptr, TACEXT_CUDA_FLOAT32, 0, 3, margins.data(), nullptr),
      0);
  EXPECT_EQ(
      tacext_cuda_pairwise_margin_max(nullptr, TACEXT_CUDA_FLOAT32, 4, 0, margins.data(), nullptr),
      0);
  EXPECT_EQ(margins, std::vector<float>(9, 5.0f));
}

// 2^38 + 1 blocks, one by a cast to 32 bits: refused before anything is read.
TEST(CudaLaunch, MoreBlocksThanAGridHoldsAreAnError) {
  const std::int64_t channels = (std::int64_t{1} << 43) + 32;
  EXPECT_NE(tacext_cuda_neuron_scores(nullptr, nullptr, TACEXT_CUDA_FLOAT32, 1, channels, 1,
                                      nullptr, nullptr, nullptr),
            0);
}

TEST(CudaScores, NoPositionsScoreZero) {
  Values scores(3, 7.0);
  EXPECT_EQ(tacext_cuda_neuron_scores_workspace(4, 3, 0), 0);
  EXPECT_EQ(tacext_cuda_neuron_scores(nullptr, nullptr, TACEXT_CUDA_FLOAT32, 4, 3, 0, scores.data(),
                                      nullptr, nullptr),
            0);
  EXPECT_EQ(scores, Values(3, 0.0));
}

TEST(CudaFinite, FindsTheFirstBadValue) {
  Values values = test::normal_values(5000, 5);
  const auto first = [&] {
    std::int64_t found = 77;
    EXPECT_EQ(tacext_cuda_first_non_finite(values.data(), static_cast<std::int64_t>(values.size()),
                                           &found, nullptr),
              0);
    return found;
  };
  EXPECT_EQ(first(), -1);
  values[4999] = kNaN;
  EXPECT_EQ(first(), 4999);
  values[1234] = -kInfinity;
  values[1300] = kInfinity;
  EXPECT_EQ(first(), 1234);
}

TestSolution solve_on_device(const TestHead& head, const double* scale = nullptr,
                             const std::vector<std::int64_t>* targets = nullptr) {
  const std::int64_t count = targets ? static_cast<std::int64_t>(targets->size()) : head.classes;
  TestSolution solution(count, head.classes, head.latents);
  const PerturbationResult to = solution.pointers();
  const tacext_cuda_perturbation_problem problem{head.weight.data(),
                                                 head.margins.data(),
                                                 scale,
                                                 targets ? targets->data() : nullptr,
                                                 count,
                                                 head.classes,
                                                 head.latents,
                                                 1e-9,
                                                 10000};
  const tacext_cuda_perturbation_result result{to.perturbation,    to.norm,          to.multipliers,
                                               to.status,          to.iterations,    to.active,
                                               to.primal_residual, to.dual_residual, to.gap};
  const std::int64_t bytes =
      tacext_cuda_minimal_perturbation_workspace(count, head.classes, head.latents);
  Values workspace(bytes / sizeof(double), std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(tacext_cuda_minimal_perturbation(&problem, &result, workspace.data(), nullptr), 0);
  EXPECT_TRUE(solution.is_complete());
  return solution;
}

void expect_same_answers(const TestSolution& device, const TestSolution& core) {
  for (std::int64_t i = 0; i < core.count; ++i) {
    SCOPED_TRACE(i);
    if (core.is(i, Status::kUnreachable)) {
      EXPECT_TRUE(device.is(i, Status::kIterationLimit)) << "unreachable is for the CPU to prove";
      continue;
    }
    ASSERT_TRUE(device.is(i, Status::kOptimal));
    EXPECT_NEAR(device.norm[i], core.norm[i], 1e-10 * core.norm[i]);
    for (std::int64_t d = 0; d < core.latents; ++d)
      EXPECT_NEAR(device.s(i)[d], core.s(i)[d], 1e-8 * (1 + core.norm[i]));
    for (std::int64_t j = 0; j < core.classes; ++j)
      EXPECT_EQ(device.l(i)[j] > 0, core.l(i)[j] > 0) << "active set, " << j;
    EXPECT_LE(std::max({device.primal[i], device.dual[i], device.gap[i]}), 1e-9);
  }
}

TEST(CudaPerturbation, EqualsTheCoreOnVariousHeads) {
  for (const test::NamedHead& named : test::various_heads()) {
    SCOPED_TRACE(named.name);
    std::vector<std::int64_t> targets{1, 0};  // a few classes, for the time it takes
    if (named.head.classes > 6) targets.insert(targets.end(), {6, 2});
    const TestSolution core = test::solve(named.head, {1e-9, 0, false}, nullptr, &targets);
    in_both_orders<Values>([&] {
      const TestSolution device = solve_on_device(named.head, nullptr, &targets);
      expect_same_answers(device, core);
      return device.multipliers;
    });
  }
}

TEST(CudaPerturbation, EqualsTheCoreWhereConstraintsLeave) {
  const TestHead head = test::random_head(60, 30, 150, 50);
  std::vector<std::int64_t> targets{59, 7, 7, 0, 31, 12, 45};
  const TestSolution core = test::solve(head, {1e-9, 0, false}, nullptr, &targets);
  const TestSolution device = solve_on_device(head, nullptr, &targets);
  expect_same_answers(device, core);
  EXPECT_EQ(std::memcmp(device.s(1), device.s(2), 30 * sizeof(double)), 0);
  std::int64_t steps = 0, active = 0;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    steps += device.iterations[i];
    active += device.active[i];
  }
  EXPECT_GT(steps, active) << "a head on which no constraint ever leaves tests no removal";
}

// Constraints that depend on the active ones: one of those leaves without a step.
TEST(CudaPerturbation, EqualsTheCoreInFewLatents) {
  for (unsigned seed = 60; seed < 62; ++seed) {
    SCOPED_TRACE(seed);
    const TestHead head = test::random_head(9, 3, 30, seed);
    const TestSolution core = test::solve(head, {1e-9, 0, false});
    in_both_orders<Values>([&] {
      const TestSolution device = solve_on_device(head);
      expect_same_answers(device, core);
      return device.multipliers;
    });
  }
}

TEST(CudaPerturbation, EqualsTheCoreOnSeveralTilesOfTheGramMatrix) {
  const TestHead head = test::random_head(150, 20, 100, 53);
  const std::vector<std::int64_t> targets{0, 140};
  expect_same_answers(solve_on_device(head, nullptr, &targets),
                      test::solve(head, {1e-9, 0, false}, nullptr, &targets));
}

// Finite inputs whose Gram matrix overflows: nothing is certified, nothing is written elsewhere.
TEST(CudaPerturbation, OverflowIsLeftToTheCpu) {
  for (double size : {1e155, 1e200, 1e300})
    for (std::int64_t huge : {0, 3}) {
      TestHead head = test::random_head(8, 5, 20, 54);
      for (std::int64_t d = 0; d < head.latents; ++d) head.weight[huge * head.latents + d] *= size;
      const TestSolution device = solve_on_device(head);
      for (std::int64_t k = 0; k < head.classes; ++k) {
        EXPECT_TRUE(device.is(k, Status::kOptimal) || device.is(k, Status::kIterationLimit));
        EXPECT_TRUE(std::isfinite(device.norm[k]) || !device.is(k, Status::kOptimal));
      }
      EXPECT_TRUE(device.is(huge, Status::kIterationLimit));
    }
}

// Most rows huge and alike: a mean of them would blur the small ones.
TEST(CudaPerturbation, HugeRowsDoNotBlurSmallOnes) {
  for (double huge : {1e8, 1e12, 1e16}) {
    SCOPED_TRACE(huge);
    const TestHead head = huge_and_small_rows(huge);
    const TestSolution device = solve_on_device(head);
    ASSERT_TRUE(device.is(9, Status::kOptimal));
    EXPECT_NEAR(device.norm[9], std::sqrt(10.0), 1e-14);
    EXPECT_GE(head.constraint(9, 8, 0) * device.s(9)[0] + head.constraint(9, 8, 1) * device.s(9)[1],
              1 - 1e-14);
  }
}

// Rows that differ by a common component alone are as good as those without it.
TEST(CudaPerturbation, ACommonComponentIsTakenOff) {
  TestHead head = test::random_head(10, 16, 30, 55);
  for (double& w : head.weight) w = std::ldexp(std::round(std::ldexp(w, 20)), -20);
  TestHead shifted = head;
  for (std::int64_t i = 0; i < 160; ++i) shifted.weight[i] += i % 16 < 8 ? 1e8 : -1e8;
  const TestSolution plain = solve_on_device(head), device = solve_on_device(shifted);
  for (std::int64_t k = 0; k < 10; ++k) {
    ASSERT_TRUE(device.is(k, Status::kOptimal)) << k;
    EXPECT_NEAR(device.norm[k], plain.norm[k], 1e-12 * plain.norm[k]);
  }
}

// What the products of close rows cannot tell is left to the CPU.
TEST(CudaPerturbation, CertifiesNothingWithinItsRounding) {
  std::int64_t open = 0;
  for (unsigned seed = 56; seed < 60; ++seed) {
    TestHead head{12, 10, test::normal_values(120, seed, 1e-7), {}};
    for (std::int64_t i = 0; i < 120; ++i) head.weight[i] += i / 10 % 2 ? 1 : -1;
    head.margins = test::random_margins(head.weight, 12, 10, 50, seed + 100);
    const TestSolution device = solve_on_device(head);
    for (std::int64_t k = 0; k < 12; ++k)
      if (device.is(k, Status::kOptimal))
        EXPECT_LE(test::violation_of(head, device, k).relative, 1e-9L) << seed << " " << k;
      else
        ++open;
  }
  EXPECT_GT(open, 30);
}

// s.s underflows: no residual means anything.
TEST(CudaPerturbation, UnderflowIsLeftToTheCpu) {
  TestHead head = test::random_head(8, 5, 20, 58);
  for (double& margin : head.margins) margin = 1e-200 * (0.1 + std::fabs(margin));
  const TestSolution device = solve_on_device(head), core = test::solve(head);
  for (std::int64_t k = 0; k < 8; ++k) {
    EXPECT_TRUE(device.is(k, Status::kIterationLimit)) << k;
    EXPECT_FALSE(core.is(k, Status::kIterationLimit)) << k;
  }
}

// s that no double holds, and s of which nothing is left: not what was certified.
TEST(CudaPerturbation, WhatLosesDigitsInStoringIsLeftToTheCpu) {
  const auto diagonal = [](double weight, double margin) {
    return TestHead{2, 2, {weight, 0, 0, weight}, {0, margin, margin, 0}};
  };
  const Values large(2, 1e200), small(2, 1e-200), none(2, 1.0);
  const auto expect_open = [](const TestSolution& device, bool open) {
    for (std::int64_t k = 0; k < 2; ++k)
      EXPECT_EQ(device.is(k, Status::kIterationLimit), open) << k;
  };
  expect_open(solve_on_device(diagonal(1e-200, 1e120), large.data()), true);  // 1e320
  expect_open(solve_on_device(diagonal(1e200, 1e-130), small.data()), true);  // 1e-330
  expect_open(solve_on_device(diagonal(1e200, 1e-115), small.data()), true);  // 1e-315
  expect_open(solve_on_device(diagonal(1e200, 1e-90), small.data()), false);
  expect_open(solve_on_device(diagonal(1, 1), none.data()), false);
}

TEST(CudaPerturbation, SumsOfLikeTermsHideNoViolation) {
  const TestHead head = test::drifting_head();
  const TestSolution device = solve_on_device(head);
  if (device.is(0, Status::kOptimal)) {
    EXPECT_LE(test::violation_of(head, device, 0).relative, 1e-9L);
  }
}

// A scale rounds what is left of the rows, not the component that they share.
TEST(CudaPerturbation, AScaleKeepsTheDigitsOfDifferences) {
  TestHead head = test::random_head(8, 12, 30, 59), shifted = head;
  for (std::size_t i = 0; i < head.weight.size(); ++i) {
    shifted.weight[i] = 1 + 1e-6 * head.weight[i];
    head.weight[i] = shifted.weight[i] - 1;
  }
  for (double& margin : head.margins) margin *= 1e-6;
  shifted.margins = head.margins;
  Values scale = test::normal_values(12, 60);
  for (double& value : scale) value = 0.1 + std::fabs(value);
  const TestSolution plain = solve_on_device(head, scale.data()),
                     device = solve_on_device(shifted, scale.data());
  for (std::int64_t k = 0; k < 8; ++k) {
    ASSERT_TRUE(device.is(k, Status::kOptimal)) << k;
    EXPECT_NEAR(device.norm[k], plain.norm[k], 1e-13 * plain.norm[k]) << k;
  }
}

TEST(CudaPerturbation, ScaleIsAMetric) {
  const TestHead head = test::random_head(11, 70, 40, 51);
  Values scale = test::normal_values(70, 52);
  for (double& value : scale) value = 0.1 + std::fabs(value);
  const std::vector<std::int64_t> targets{10, 0, 4};
  expect_same_answers(solve_on_device(head, scale.data(), &targets),
                      test::solve(head, {1e-9, 0, false}, scale.data(), &targets));
}

}  // namespace
}  // namespace tacext
