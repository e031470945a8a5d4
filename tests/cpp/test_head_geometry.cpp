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

}  // namespace
}  // namespace tacext
