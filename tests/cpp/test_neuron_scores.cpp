#include <gtest/gtest.h>

#include <limits>

#include "tacext/neuron_scores.h"
#include "test_support.h"

namespace tacext {
namespace {

struct Sizes {
  std::int64_t samples, channels, positions;
};

// The definition in long double; the sum of absolute terms bounds the rounding.
template <class T>
void expect_scores(const std::vector<T>& a, const std::vector<T>& g, const Sizes& n,
                   const std::vector<double>& scores) {
  for (std::int64_t c = 0; c < n.channels; ++c) {
    long double sum = 0, size = 0;
    for (std::int64_t i = 0; i < n.samples; ++i)
      for (std::int64_t p = 0; p < n.positions; ++p) {
        const std::int64_t at = (i * n.channels + c) * n.positions + p;
        const long double term = static_cast<long double>(to_float(a[at])) * to_float(g[at]);
        sum += term;
        size += term < 0 ? -term : term;
      }
    const double wanted = static_cast<double>(sum / n.samples);
    EXPECT_NEAR(scores[c], wanted, 1e-13 * static_cast<double>(size / n.samples))
        << "channel " << c << " of " << n.samples << " x " << n.channels << " x " << n.positions;
  }
}

template <class T>
class NeuronScores : public testing::Test {};
using Elements = testing::Types<float, double, Half, BFloat16>;
TYPED_TEST_SUITE(NeuronScores, Elements);

TYPED_TEST(NeuronScores, EqualTheDefinition) {
  for (const Sizes& n : {Sizes{1, 1, 1}, Sizes{7, 5, 1}, Sizes{3, 4, 2}, Sizes{9, 3, 8},
                         Sizes{5, 6, 49}, Sizes{2, 2, 1000}, Sizes{300, 17, 1}}) {
    const std::int64_t count = n.samples * n.channels * n.positions;
    const auto a = test::as_elements<TypeParam>(test::normal_values(count, 1));
    const auto g = test::as_elements<TypeParam>(test::normal_values(count, 2));
    std::vector<double> scores(n.channels, 99.0);
    neuron_scores(a.data(), g.data(), n.samples, n.channels, n.positions, scores.data(),
                  serial_for);
    expect_scores(a, g, n, scores);
  }
}

TEST(NeuronScoresLimits, NaNShowsInItsChannelAlone) {
  std::vector<float> a(4 * 3 * 5, 1.0f), g = a;
  a[(2 * 3 + 1) * 5 + 4] = std::numeric_limits<float>::quiet_NaN();
  std::vector<double> scores(3);
  neuron_scores(a.data(), g.data(), 4, 3, 5, scores.data(), serial_for);
  EXPECT_EQ(scores[0], 5);
  EXPECT_TRUE(std::isnan(scores[1]));
  EXPECT_EQ(scores[2], 5);
}

TEST(NeuronScoresLimits, NoPositionsScoreZero) {
  std::vector<double> scores(3, 7.0);
  const float none = 0;
  neuron_scores(&none, &none, 4, 3, 0, scores.data(), serial_for);
  EXPECT_EQ(scores, std::vector<double>(3, 0.0));
}

// Large terms that cancel: sums in float would lose the small one.
TEST(NeuronScoresLimits, SumsInDouble) {
  const std::vector<float> a{1e8f, 1.0f, -1e8f}, g{1.0f, 1.0f, 1.0f};
  std::vector<double> scores(1);
  neuron_scores(a.data(), g.data(), 3, 1, 1, scores.data(), serial_for);
  EXPECT_DOUBLE_EQ(scores[0], 1.0 / 3);
}

}  // namespace
}  // namespace tacext
