#include <gtest/gtest.h>

#include "head_geometry.h"
#include "test_support.h"

namespace tacext {
namespace {

using test::TestHead;
using test::Values;

HeadGeometry geometry_of(const TestHead& head, const double* scale = nullptr) {
  return HeadGeometry({head.weight.data(), head.margins.data(), scale, nullptr, head.classes,
                       head.classes, head.latents},
                      serial_for);
}

/// Differences of rows are those of W, bit for bit, but for the power of two.
void expect_exact_differences(const TestHead& head, const HeadGeometry& geometry) {
  const double unit = std::ldexp(1.0, -geometry.exponent());
  for (std::int64_t k = 0; k < head.classes; ++k)
    for (std::int64_t j = 0; j < head.classes; ++j)
      for (std::int64_t d = 0; d < head.latents; ++d)
        ASSERT_EQ(geometry.row(k)[d] - geometry.row(j)[d], unit * head.constraint(k, j, d))
            << k << " " << j << " " << d;
}

TEST(HeadGeometry, ACommonComponentIsTakenOffExactly) {
  for (const double common : {1e8, -1e8}) {
    TestHead head = test::random_head(10, 16, 5, 1);
    for (std::int64_t i = 0; i < head.classes * head.latents; ++i)
      if (i % head.latents != 3) head.weight[i] += common;  // latent 3 has no common component
    const HeadGeometry geometry = geometry_of(head);
    expect_exact_differences(head, geometry);
    const double unit = std::ldexp(1.0, -geometry.exponent());
    for (std::int64_t j = 0; j < head.classes; ++j)
      EXPECT_LT(geometry.row_length(j), 20 * unit) << j;
  }
}

// A scale rounds every entry: of the centred rows, and not of the component that they share.
TEST(HeadGeometry, AScaleKeepsTheDigitsOfDifferences) {
  for (const double apart : {1e-4, 1e-8, 1e-10}) {
    TestHead head = test::random_head(10, 16, 5, 6);
    for (double& w : head.weight) w = 1 + apart * w;
    Values scale = test::normal_values(16, 7);
    for (double& value : scale) value = 0.1 + std::fabs(value);
    const HeadGeometry geometry = geometry_of(head, scale.data());
    const double unit = std::ldexp(1.0, -geometry.exponent());
    for (std::int64_t k = 0; k < 10; ++k)
      for (std::int64_t j = 0; j < 10; ++j)
        for (std::int64_t d = 0; d < 16; ++d) {
          const double wanted = unit * scale[d] * head.constraint(k, j, d);
          ASSERT_NEAR(geometry.row(k)[d] - geometry.row(j)[d], wanted, 1e-14 * apart * unit);
        }
  }
}

TEST(HeadGeometry, RowsOfZerosDoNotHideTheUnitOfTheOthers) {
  for (const std::int64_t classes : {64, 128, 300}) {
    TestHead head{classes, 2, Values(classes * 2, 0.0), {}};
    head.weight[classes * 2 - 1] = 1e160;  // no row that a sample would look at
    const HeadGeometry geometry = geometry_of(head);
    EXPECT_EQ(geometry.exponent(), std::ilogb(1e160));
    EXPECT_LT(geometry.row_length(classes - 1), 2);
  }
}

// A product with the scale must not lose, on the way, what its unit would give back.
TEST(HeadGeometry, ExtremeScalesLoseNoDigit) {
  const TestHead head{2, 2, {1e-200, 3e-200, 1e-200, -1e-200}, {}};
  const Values scale{1.0, 1e-115};  // the first latent is centred away
  const HeadGeometry geometry = geometry_of(head, scale.data());
  const double difference = geometry.row(0)[1] - geometry.row(1)[1];
  EXPECT_NEAR(std::ldexp(difference, geometry.exponent() + 900), std::ldexp(4e-200, 900) * 1e-115,
              1e-15 * std::ldexp(4e-200, 900) * 1e-115);
}

// A mean of the huge ones would blur the digits of the small ones.
TEST(HeadGeometry, SmallRowsBesideHugeOnesKeepTheirDigits) {
  for (const double huge : {1e8, 1e12, 1e16}) {
    TestHead head = test::random_head(10, 3, 5, 2);
    for (std::int64_t j = 0; j < 8; ++j) head.weight[j * 3] = huge;
    expect_exact_differences(head, geometry_of(head));
  }
}

TEST(HeadGeometry, RowsAreNearOneWhateverTheirUnit) {
  const TestHead head = test::random_head(9, 7, 5, 3);
  const auto expect_near_one = [&](const HeadGeometry& geometry, int exponent) {
    for (std::int64_t j = 0; j < 9; ++j) {
      EXPECT_GT(geometry.row_length(j), 1e-12);
      EXPECT_LT(geometry.row_length(j), 1e12);
      for (std::int64_t d = 0; d < 7; ++d)
        EXPECT_EQ(std::ldexp(geometry.row(j)[d], geometry.exponent() - exponent),
                  head.weight[j * 7 + d]);
    }
  };
  for (const int exponent : {-1000, -530, -3, 0, 5, 530, 1000}) {
    SCOPED_TRACE(exponent);
    TestHead scaled = head;
    for (double& w : scaled.weight) w = std::ldexp(w, exponent);
    const Values scale(7, std::ldexp(1.0, exponent));
    expect_near_one(geometry_of(scaled), exponent);
    expect_near_one(geometry_of(head, scale.data()), exponent);
  }
  TestHead both = head;  // large weights in a large scale: their product is no double
  for (double& w : both.weight) w = std::ldexp(w, 1000);
  const Values scale(7, std::ldexp(1.0, 1000));
  expect_near_one(geometry_of(both, scale.data()), 2000);
}

TEST(HeadGeometry, DifferencesOfProductsStayWithinTheirNoise) {
  for (const std::int64_t latents : {3, 100, 20000}) {
    TestHead head = test::random_head(6, latents, 5, 4);
    Values x = test::normal_values(latents, 5);
    for (std::int64_t d = 0; d < latents; ++d) {  // close rows, and products of one sign
      for (std::int64_t j = 1; j < 5; ++j)
        head.weight[j * latents + d] = head.weight[d] + 1e-9 * head.weight[j * latents + d];
      head.weight[5 * latents + d] = -head.weight[d];  // nothing in common to take off
      if (latents == 20000) x[d] = head.weight[d];
    }
    const HeadGeometry geometry = geometry_of(head);
    const double length = std::sqrt(dot(x.data(), x.data(), latents));
    Values products(6);
    geometry.packed().multiply(x.data(), 1, 6, products.data(), 6);
    for (std::int64_t j = 1; j < 5; ++j)
      EXPECT_LE(std::fabs(products[0] - products[j] - geometry.constraint_dot(0, j, x.data())),
                geometry.difference_noise(0, j) * length)
          << latents << " " << j;
  }
}

TEST(HeadGeometry, SumsOfLikeTermsStayWithinTheirNoise) {
  for (const std::int64_t latents : {100, 2048, 20000}) {
    // Sums of one and the same term round the same way for long.
    TestHead head{3, latents, Values(3 * latents, 1.0), Values(9, 0.0)};
    for (std::int64_t d = 0; d < latents; ++d) {
      head.weight[latents + d] = 1 + 1e-9;
      head.weight[2 * latents + d] = -1;  // nothing in common to take off
    }
    const HeadGeometry geometry = geometry_of(head);
    double most = 0;
    for (int step = 0; step < 50; ++step) {
      const Values x(latents, 1 + step / 37.0);
      Values products(3);
      geometry.packed().multiply(x.data(), 1, 3, products.data(), 3);
      const double length = std::sqrt(dot(x.data(), x.data(), latents));
      const double off =
          products[0] - products[1] - geometry.constraint_dot_doubled(0, 1, x.data()).value();
      most = std::max(most, std::fabs(off) / length);
      ASSERT_LE(std::fabs(off), geometry.difference_noise(0, 1) * length) << latents;
    }
    if (latents == 20000) {
      EXPECT_GT(most, geometry.usual_difference_noise(0, 1)) << "tests no bound";
    }
  }
}

}  // namespace
}  // namespace tacext
