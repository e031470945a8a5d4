#include <gtest/gtest.h>

#include "doubled.h"
#include "test_support.h"

namespace tacext {
namespace {

using test::Values;

TEST(Doubled, SumsAndProductsAreExact) {
  const double small = std::ldexp(1.0, -60);
  const Doubled sum = two_sum(1.0, small);
  EXPECT_EQ(sum.high, 1.0);
  EXPECT_EQ(sum.low, small);
  const double above = 1 + std::ldexp(1.0, -30);
  const Doubled product = two_product(above, above);
  EXPECT_EQ(product.high, 1 + std::ldexp(1.0, -29));
  EXPECT_EQ(product.low, small);
  EXPECT_EQ(remainder_of(product.high, product), -small);
}

// Terms of 2^100 cancel to the last bit of the ones between them, wherever they stand.
TEST(Doubled, WhatIsLeftOfHugeTermsIsExact) {
  for (const std::int64_t count : {2, 7, 8, 9, 16, 61, 500}) {
    const double huge = std::ldexp(1.0, 50), tiny = std::ldexp(1.0, -50);
    Values a(count, 0.0), b(count, 0.0), s(count, 0.0);
    a.front() = huge;
    s.front() = huge;
    b.back() = huge;  // a - b = -2^50
    s.back() = huge;
    for (std::int64_t d = 1; d + 1 < count; ++d) {
      a[d] = 1 + tiny;  // a - b = 2^-50
      b[d] = 1;
      s[d] = 1 + tiny;
    }
    const double wanted = static_cast<double>(count - 2) * (tiny + tiny * tiny);
    const Doubled sum = dot_difference_doubled(a.data(), b.data(), s.data(), count);
    EXPECT_NEAR(sum.value(), wanted, 1e-14 * wanted) << count;
    EXPECT_EQ(remainder_of(sum.value(), sum), 0) << count;
  }
}

TEST(Doubled, DifferencesThatRoundAreKept) {
  const Values a{1.0}, b{-std::ldexp(1.0, -70)}, s{1.0};
  EXPECT_EQ(dot_difference_doubled(a.data(), b.data(), s.data(), 1).low, std::ldexp(1.0, -70));
}

TEST(Doubled, WeightedDifferencesCancel) {
  const std::int64_t count = 21;
  Values base = test::normal_values(count, 1), rows[3] = {base, base, base};
  for (std::int64_t d = 0; d < count; ++d) {
    rows[0][d] -= 1;
    rows[1][d] += 1;
    rows[2][d] = base[d] - std::ldexp(1.0, -40);
  }
  const double weights[] = {std::ldexp(1.0, 60), std::ldexp(1.0, 60), 1.0};
  const auto sums = weighted_differences_doubled(
      base.data(), {rows[0].data(), rows[1].data(), rows[2].data()}, weights, count);
  for (std::int64_t d = 0; d < count; ++d) {
    const long double first = static_cast<long double>(base[d]) - rows[0][d],
                      second = static_cast<long double>(base[d]) - rows[1][d];
    const double wanted =
        static_cast<double>((first + second) * weights[0]) + (base[d] - rows[2][d]);
    EXPECT_EQ(sums[d].value(), wanted) << d;
  }
}

}  // namespace
}  // namespace tacext
