#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tacext/find_non_finite.h"
#include "tacext/pairwise_margin_max.h"
#include "test_support.h"

namespace tacext {
namespace {

template <class T>
using MarginOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The definition, with each difference rounded once in the type of the margins.
template <class T>
void reference(const std::vector<T>& logits, std::int64_t samples, std::int64_t classes,
               std::vector<MarginOf<T>>& margins) {
  for (std::int64_t k = 0; k < classes; ++k)
    for (std::int64_t j = 0; j < classes; ++j)
      for (std::int64_t i = 0; i < samples; ++i) {
        const MarginOf<T> difference =
            to_float(logits[i * classes + j]) - to_float(logits[i * classes + k]);
        margins[k * classes + j] = std::max(margins[k * classes + j], difference);
      }
}

template <class T>
class PairwiseMarginMax : public testing::Test {};
using Elements = testing::Types<float, double, Half, BFloat16>;
TYPED_TEST_SUITE(PairwiseMarginMax, Elements);

TYPED_TEST(PairwiseMarginMax, EqualsTheDefinition) {
  using Margin = MarginOf<TypeParam>;
  for (std::int64_t classes : {1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 70})
    for (std::int64_t samples : {1, 2, 7, 8, 9, 300}) {
      const auto logits =
          test::as_elements<TypeParam>(test::normal_values(samples * classes, classes, 10));
      std::vector<Margin> wanted(classes * classes, -kInfinity);
      reference(logits, samples, classes, wanted);
      test::with_each_simd_width([&] {
        std::vector<Margin> got(classes * classes, -kInfinity);
        pairwise_margin_max(logits.data(), samples, classes, got.data(), serial_for);
        ASSERT_EQ(got, wanted) << classes << " classes, " << samples << " samples";
      });
    }
}

// Enough classes and samples to be screened in 8-bit integers.
TYPED_TEST(PairwiseMarginMax, ScreenedEqualsTheDefinition) {
  using Margin = MarginOf<TypeParam>;
  const std::int64_t classes = 289, samples = 1301;
  for (const bool ties : {false, true}) {
    auto values = test::normal_values(samples * classes, 5, 3);
    for (std::int64_t i = 0; i < samples; ++i) values[i * classes + i % classes] += 20;
    if (ties)
      for (double& value : values) value = std::round(value);
    const auto logits = test::as_elements<TypeParam>(values);
    std::vector<Margin> wanted(classes * classes, -kInfinity);
    reference(logits, samples, classes, wanted);
    test::with_each_simd_width([&] {
      std::vector<Margin> got(classes * classes, -kInfinity), threaded = got;
      pairwise_margin_max(logits.data(), samples, classes, got.data(), serial_for);
      pairwise_margin_max(logits.data(), samples, classes, threaded.data(), test::odd_threads);
      ASSERT_EQ(got, wanted) << ties;
      ASSERT_EQ(threaded, wanted) << ties;
    });
  }
}

TYPED_TEST(PairwiseMarginMax, BatchesAccumulate) {
  using Margin = MarginOf<TypeParam>;
  const std::int64_t classes = 21, samples = 50;
  const auto logits = test::as_elements<TypeParam>(test::normal_values(samples * classes, 1));
  std::vector<Margin> whole(classes * classes, -kInfinity), parts = whole;
  pairwise_margin_max(logits.data(), samples, classes, whole.data(), serial_for);
  for (std::int64_t begin = 0; begin < samples; begin += 13)
    pairwise_margin_max(logits.data() + begin * classes,
                        std::min<std::int64_t>(13, samples - begin), classes, parts.data(),
                        serial_for);
  EXPECT_EQ(parts, whole);
  const std::vector<Margin> before = parts;
  pairwise_margin_max(logits.data(), 0, classes, parts.data(), serial_for);
  EXPECT_EQ(parts, before) << "no samples must change nothing";
}

TYPED_TEST(PairwiseMarginMax, KeepsWhatIsAlreadyLarger) {
  using Margin = MarginOf<TypeParam>;
  const auto logits = test::as_elements<TypeParam>(test::normal_values(3 * 6, 2));
  std::vector<Margin> margins(6 * 6, Margin{1000});
  pairwise_margin_max(logits.data(), 3, 6, margins.data(), serial_for);
  EXPECT_EQ(margins, std::vector<Margin>(6 * 6, Margin{1000}));
}

TYPED_TEST(PairwiseMarginMax, WritesNothingBesideTheMargins) {
  using Margin = MarginOf<TypeParam>;
  const std::int64_t classes = 19;
  const auto logits = test::as_elements<TypeParam>(test::normal_values(5 * classes, 3));
  std::vector<Margin> guarded(classes * classes + 64, Margin{77});
  std::fill_n(guarded.begin(), classes * classes, -kInfinity);
  pairwise_margin_max(logits.data(), 5, classes, guarded.data(), serial_for);
  for (std::int64_t i = classes * classes; i < static_cast<std::int64_t>(guarded.size()); ++i)
    ASSERT_EQ(guarded[i], Margin{77}) << i;
}

TYPED_TEST(PairwiseMarginMax, FindsTheFirstNonFiniteValue) {
  const std::int64_t rows = 40, columns = 13;
  for (double bad : {static_cast<double>(kInfinity), -static_cast<double>(kInfinity),
                     std::numeric_limits<double>::quiet_NaN()}) {
    auto values = test::as_elements<TypeParam>(test::normal_values(rows * columns, 4));
    EXPECT_EQ(find_non_finite(values.data(), rows, columns, serial_for).row, -1);
    TypeParam element;
    if constexpr (std::is_same_v<TypeParam, Half>)
      element = {static_cast<std::uint16_t>(bad > 0 ? 0x7c00 : bad < 0 ? 0xfc00 : 0x7e01)};
    else if constexpr (std::is_same_v<TypeParam, BFloat16>)
      element = {static_cast<std::uint16_t>(bad > 0 ? 0x7f80 : bad < 0 ? 0xff80 : 0x7fc1)};
    else
      element = static_cast<TypeParam>(bad);
    values[31 * columns + 2] = element;
    values[17 * columns + 12] = element;
    values[17 * columns + 5] = element;
    const MatrixIndex serial = find_non_finite(values.data(), rows, columns, serial_for);
    EXPECT_EQ(serial.row, 17);
    EXPECT_EQ(serial.column, 5);
    const MatrixIndex threaded = find_non_finite(values.data(), rows, columns, test::odd_threads);
    EXPECT_EQ(threaded.row, 17);
    EXPECT_EQ(threaded.column, 5);
  }
}

TEST(PairwiseMarginMaxLimits, LargestFloatsAreFiniteToo) {
  const float largest = std::numeric_limits<float>::max();
  const std::vector<float> values{largest, -largest, 0.0f, std::numeric_limits<float>::min()};
  EXPECT_EQ(find_non_finite(values.data(), 2, 2, serial_for).row, -1);
}

}  // namespace
}  // namespace tacext
