#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <tuple>

#include "tacext/pairwise_margin_max.h"
#include "tacext/pairwise_margin_quantile.h"
#include "test_support.h"

namespace tacext {
namespace {

template <class T>
using MarginOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// All differences of a pair, largest first.
template <class T>
std::vector<MarginOf<T>> sorted_differences(const std::vector<T>& logits, std::int64_t samples,
                                            std::int64_t classes, std::int64_t k, std::int64_t j) {
  std::vector<MarginOf<T>> differences;
  for (std::int64_t i = 0; i < samples; ++i)
    differences.push_back(static_cast<MarginOf<T>>(to_float(logits[i * classes + j])) -
                          static_cast<MarginOf<T>>(to_float(logits[i * classes + k])));
  std::sort(differences.begin(), differences.end(), std::greater<>());
  return differences;
}

template <class T>
class PairwiseMarginQuantile : public testing::Test {};
using Elements = testing::Types<float, double, Half, BFloat16>;
TYPED_TEST_SUITE(PairwiseMarginQuantile, Elements);

TYPED_TEST(PairwiseMarginQuantile, EqualsTheSortedDifferences) {
  using Margin = MarginOf<TypeParam>;
  for (std::int64_t classes : {1, 2, 7, 33})
    for (std::int64_t samples : {1, 5, 64, 1500})
      for (std::int64_t keep : {1, 2, 40, 1500}) {
        if (keep > samples) continue;
        const auto logits =
            test::as_elements<TypeParam>(test::normal_values(samples * classes, classes, 10));
        std::vector<Margin> wanted(classes * classes);
        for (std::int64_t k = 0; k < classes; ++k)
          for (std::int64_t j = 0; j < classes; ++j)
            wanted[k * classes + j] = sorted_differences(logits, samples, classes, k, j)[keep - 1];
        test::with_each_simd_width([&] {
          std::vector<Margin> got(classes * classes), threaded = got;
          pairwise_margin_quantile(logits.data(), samples, classes, keep, got.data(), serial_for);
          pairwise_margin_quantile(logits.data(), samples, classes, keep, threaded.data(),
                                   test::odd_threads);
          ASSERT_EQ(got, wanted) << classes << " " << samples << " " << keep;
          ASSERT_EQ(threaded, wanted);
        });
      }
}

TYPED_TEST(PairwiseMarginQuantile, StreamsKeepTheLargest) {
  using Margin = MarginOf<TypeParam>;
  const std::int64_t classes = 5, samples = 700, keep = 23;
  const auto logits = test::as_elements<TypeParam>(test::normal_values(samples * classes, 8));
  std::vector<Margin> largest(classes * classes * keep, -kInfinity);
  for (std::int64_t begin = 0, size = 1; begin < samples; begin += size, size = 2 * size + 3)
    pairwise_margin_largest(logits.data() + begin * classes, std::min(size, samples - begin),
                            classes, keep, largest.data(), serial_for);
  for (std::int64_t pair = 0; pair < classes * classes; ++pair) {
    const auto begin = largest.begin() + pair * keep;
    std::sort(begin, begin + keep, std::greater<>());
    const auto wanted =
        sorted_differences(logits, samples, classes, pair / classes, pair % classes);
    ASSERT_TRUE(std::equal(begin, begin + keep, wanted.begin())) << pair;
  }
}

TYPED_TEST(PairwiseMarginQuantile, FewSamplesLeavePlacesEmpty) {
  using Margin = MarginOf<TypeParam>;
  const auto logits = test::as_elements<TypeParam>(test::normal_values(3 * 2, 9));
  std::vector<Margin> guarded(2 * 2 * 5 + 32, Margin{77});
  std::fill_n(guarded.begin(), 2 * 2 * 5, -kInfinity);
  pairwise_margin_largest(logits.data(), 3, 2, 5, guarded.data(), serial_for);
  for (std::int64_t pair = 0; pair < 4; ++pair)
    EXPECT_EQ(std::count(guarded.begin() + pair * 5, guarded.begin() + pair * 5 + 5, -kInfinity),
              2);
  for (std::size_t i = 2 * 2 * 5; i < guarded.size(); ++i) ASSERT_EQ(guarded[i], Margin{77}) << i;
}

TEST(PairwiseMarginQuantile, SmallProblemsStayOnTheCallingThread) {
  for (const auto& [samples, classes, shared] : {std::tuple{2500, 10, false}, {2500, 43, true}}) {
    const auto logits = test::normal_values(samples * classes, 3);
    std::vector<double> margins(classes * classes);
    std::int64_t calls = 0;
    pairwise_margin_quantile(logits.data(), samples, classes, 26, margins.data(),
                             [&](std::int64_t count, std::int64_t grain, const RangeBody& body) {
                               ++calls;
                               serial_for(count, grain, body);
                             });
    EXPECT_EQ(calls > 0, shared) << classes;
  }
}

}  // namespace
}  // namespace tacext
