#include <array>
#include <cmath>
#include <limits>

#include "cuda_test_support.h"
#include "guard_support.h"

// The kernel itself, run on the host, against the core.
namespace tacext {
namespace {

using test::Answers;
using test::in_both_orders;
using test::kType;
using test::RandomGuard;

template <class T>
void judge_on_device(const RandomGuard& g, const std::vector<T>& latent,
                     const std::vector<T>& logits, std::int64_t count, Answers& answers) {
  const tacext_cuda_guard_table table{g.classes,
                                      g.latents,
                                      g.ranks,
                                      g.knot_count,
                                      g.mean.data(),
                                      g.inverse_spread.data(),
                                      g.basis.data(),
                                      g.near_weight.data(),
                                      g.far_weight.data(),
                                      g.direction.data(),
                                      g.location.data(),
                                      g.inverse_deviation.data(),
                                      g.knots.data(),
                                      g.exceeding.data(),
                                      &g.threshold,
                                      &g.samples};
  const GuardAnswer to = answers.answer();
  EXPECT_EQ(tacext_cuda_guard_score(&table, latent.data(), logits.data(), kType<T>, count, to.score,
                                    to.p_value, to.flagged, nullptr),
            0);
}

template <class T>
class CudaGuardScore : public testing::Test {};
using Elements = testing::Types<float, double, Half, BFloat16>;
TYPED_TEST_SUITE(CudaGuardScore, Elements);

TYPED_TEST(CudaGuardScore, EqualsTheCore) {
  // Fewer classes, latents and sums than there are threads, lanes and warps, and more.
  for (const auto& [classes, latents, ranks, count] : {std::array<std::int64_t, 4>{2, 1, 1, 1},
                                                       {3, 15, 4, 5},
                                                       {10, 16, 0, 7},
                                                       {10, 64, 32, 9},
                                                       {300, 131, 6, 3},
                                                       {5, 300, 256, 2},
                                                       {3, 2500, 4, 2}}) {
    const RandomGuard g(classes, latents, ranks, 50);
    const auto x = test::as_elements<TypeParam>(test::normal_values(count * latents, 5));
    const auto z = test::as_elements<TypeParam>(test::normal_values(count * classes, 6));
    Answers wanted(count);
    guard_score<TypeParam>(g.table(), {x.data(), latents, z.data(), classes, count},
                           wanted.answer(), serial_for);
    Answers found(count);
    in_both_orders<std::vector<float>>([&] {
      judge_on_device(g, x, z, count, found);
      return found.score;
    });
    for (std::int64_t i = 0; i < count; ++i) {
      EXPECT_NEAR(found.score[i], wanted.score[i], 2e-5 * (1 + wanted.score[i]))
          << latents << " latents, row " << i;
      test::expect_rank_of_score(g, found, i);
    }
  }
}

TEST(CudaGuard, WhatIsNotFiniteIsFlaggedAlone) {
  const RandomGuard g(4, 37, 8, 20);
  test::expect_not_finite_rows_are_flagged(g, [&g](const auto& x, const auto& z, Answers& answers) {
    judge_on_device(g, x, z, 9, answers);
  });
}

// Within a thread, a warp and a block.
TEST(CudaGuard, TheFirstOfEqualLogitsIsPredicted) {
  const RandomGuard g(600, 8, 2, 5);
  const std::vector<float> x(8, 0.5f);
  for (const auto& [one, other] : std::vector<std::pair<int, int>>{
           {10, 266}, {266, 522}, {1, 2}, {40, 300}, {31, 32}, {255, 256}, {0, 599}}) {
    std::vector<float> z(600, 1.0f);
    z[one] = z[other] = 2;
    Answers tied(1), wanted(1);
    judge_on_device(g, x, z, 1, tied);
    guard_score<float>(g.table(), {x.data(), 8, z.data(), 600, 1}, wanted.answer(), serial_for);
    EXPECT_NEAR(tied.score[0], wanted.score[0], 1e-5 * wanted.score[0]) << one << " and " << other;
  }
}

TEST(CudaGuard, AScoreThatEqualsAKnotOrTheThresholdDoesNotExceedIt) {
  RandomGuard g(5, 30, 4, 9);
  const auto x = test::as_elements<float>(test::normal_values(30, 5));
  const auto z = test::as_elements<float>(test::normal_values(5, 6));
  Answers found(1), above(1);
  judge_on_device(g, x, z, 1, found);
  for (int i = 0; i < 9; ++i) g.knots[i] = found.score[0] * (0.5f + 0.125f * i);  // the fifth is it
  ASSERT_EQ(g.knots[4], found.score[0]);
  g.threshold = found.score[0];
  judge_on_device(g, x, z, 1, found);
  EXPECT_EQ(found.p_value[0], (1 + g.exceeding[4]) / (1 + float(g.samples)));
  EXPECT_FALSE(found.flagged[0]);
  g.threshold = g.knots[4] = std::nextafter(found.score[0], 0.0f);
  judge_on_device(g, x, z, 1, above);
  EXPECT_EQ(above.p_value[0], (1 + g.exceeding[5]) / (1 + float(g.samples)));
  EXPECT_TRUE(above.flagged[0]);
}

TEST(CudaGuard, NoRowsAreNoAnswersAndTooManyRanksAnError) {
  tacext_cuda_guard_table table{};
  EXPECT_EQ(tacext_cuda_guard_score(&table, nullptr, nullptr, TACEXT_CUDA_FLOAT32, 0, nullptr,
                                    nullptr, nullptr, nullptr),
            0);
  table.ranks = TACEXT_CUDA_GUARD_MOST_RANKS + 1;
  EXPECT_NE(tacext_cuda_guard_score(&table, nullptr, nullptr, TACEXT_CUDA_FLOAT32, 1, nullptr,
                                    nullptr, nullptr, nullptr),
            0);
}

}  // namespace
}  // namespace tacext
