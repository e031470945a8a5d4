#include <gtest/gtest.h>

#include <limits>

#include "guard_support.h"

namespace tacext {
namespace {

using test::Answers;
using test::RandomGuard;

// The definition, in double.
template <class T>
double reference(const RandomGuard& g, const T* latent, const T* logits) {
  std::int64_t k = 0;
  for (std::int64_t j = 1; j < g.classes; ++j)
    if (to_float(logits[j]) > to_float(logits[k])) k = j;
  double next = -std::numeric_limits<double>::infinity();
  for (std::int64_t j = 0; j < g.classes; ++j)
    if (j != k) next = std::max<double>(next, to_float(logits[j]));
  std::vector<double> y(g.latents), squares(1 + g.ranks);
  double aligned = 0;
  for (std::int64_t d = 0; d < g.latents; ++d) {
    y[d] = (to_float(latent[d]) - double(g.mean[k * g.latents + d])) * g.inverse_spread[d];
    squares[0] += y[d] * y[d];
    aligned += y[d] * g.direction[k * g.latents + d];
  }
  for (std::int64_t r = 0; r < g.ranks; ++r) {
    double along = 0;
    for (std::int64_t d = 0; d < g.latents; ++d) along += y[d] * g.basis[r * g.latents + d];
    squares[1 + r] = along * along;
  }
  double near = 0, far = 0;
  for (std::int64_t r = 0; r <= g.ranks; ++r) {
    near += squares[r] * g.near_weight[r];
    far += squares[r] * g.far_weight[r];
  }
  const double parts[4] = {std::sqrt(std::max(0.0, near)), std::sqrt(std::max(0.0, far)), aligned,
                           to_float(logits[k]) - next};
  double total = 0;
  for (int i = 0; i < 4; ++i) {
    const double excess =
        std::max(0.0, (parts[i] - g.location[4 * k + i]) * g.inverse_deviation[4 * k + i]);
    total += excess * excess;
  }
  return std::sqrt(total);
}

template <class T>
class GuardScore : public testing::Test {};
using Elements = testing::Types<float, double, Half, BFloat16>;
TYPED_TEST_SUITE(GuardScore, Elements);

TYPED_TEST(GuardScore, EqualsTheDefinition) {
  for (const auto& [classes, latents, ranks, count] : {std::array<std::int64_t, 4>{2, 1, 1, 1},
                                                       {3, 15, 4, 5},
                                                       {10, 16, 0, 7},
                                                       {10, 64, 32, 9},
                                                       {43, 131, 33, 6},
                                                       {5, 300, 7, 4}}) {
    const RandomGuard g(classes, latents, ranks, 50);
    const auto x = test::as_elements<TypeParam>(test::normal_values(count * latents, 5));
    const auto z = test::as_elements<TypeParam>(test::normal_values(count * classes, 6));
    Answers found(count);
    guard_score<TypeParam>(g.table(), {x.data(), latents, z.data(), classes, count}, found.answer(),
                           serial_for);
    for (std::int64_t i = 0; i < count; ++i) {
      const double wanted = reference(g, x.data() + i * latents, z.data() + i * classes);
      // Squares along directions that are not orthonormal nearly cancel: their size is the scale.
      EXPECT_NEAR(found.score[i], wanted, 2e-4 * (1 + wanted)) << latents << " latents, row " << i;
      test::expect_rank_of_score(g, found, i);
    }
  }
}

TEST(GuardBits, DependOnNothingButTheRow) {
  const RandomGuard g(10, 131, 30, 50);
  const std::int64_t count = 61, wide = 140, classes = 13;
  const auto x = test::as_elements<float>(test::normal_values(count * wide, 5));
  const auto z = test::as_elements<float>(test::normal_values(count * classes, 6));
  const GuardInput<float> all{x.data(), wide, z.data(), classes, count};
  Answers expected(count);
  guard_score(g.table(), all, expected.answer(), serial_for);
  Answers threaded(count);
  guard_score(g.table(), all, threaded.answer(), test::odd_threads);
  EXPECT_EQ(threaded.score, expected.score);
  for (std::int64_t i = 0; i < count; ++i) {
    Answers alone(1);
    guard_score<float>(g.table(), {x.data() + i * wide, wide, z.data() + i * classes, classes, 1},
                       alone.answer(), serial_for);
    EXPECT_EQ(alone.score[0], expected.score[i]);
    EXPECT_EQ(alone.p_value[0], expected.p_value[i]);
  }
}

TEST(GuardLimits, WhatIsNotFiniteIsFlaggedAlone) {
  const RandomGuard g(4, 37, 8, 20);
  test::expect_not_finite_rows_are_flagged(g, [&g](const auto& x, const auto& z, Answers& answers) {
    guard_score<float>(g.table(), {x.data(), 37, z.data(), 4, 9}, answers.answer(), serial_for);
  });
}

TEST(GuardLimits, TheFirstOfEqualLogitsIsPredicted) {
  RandomGuard g(3, 8, 2, 5);
  const std::vector<float> x(8, 0.5f), z{1, 2, 2};
  Answers tied(1), clear(1);
  guard_score<float>(g.table(), {x.data(), 8, z.data(), 3, 1}, tied.answer(), serial_for);
  const std::vector<float> nearly{1, std::nextafter(2.0f, 3.0f), 2};
  guard_score<float>(g.table(), {x.data(), 8, nearly.data(), 3, 1}, clear.answer(), serial_for);
  EXPECT_NEAR(tied.score[0], clear.score[0], 1e-5);
}

}  // namespace
}  // namespace tacext
