#include <gtest/gtest.h>

#include <cmath>

#include "tacext/half.h"

namespace tacext {
namespace {

// The definition of the formats: (-1)^sign * 1.fraction * 2^(exponent - bias), with subnormals.
float reference(unsigned bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & top;
  const int fraction = static_cast<int>(bits) & ((1 << fraction_bits) - 1);
  double magnitude;
  if (exponent == top)
    magnitude = fraction == 0 ? HUGE_VAL : std::nan("");
  else if (exponent == 0)
    magnitude = std::ldexp(fraction, 1 - bias - fraction_bits);
  else
    magnitude = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  return static_cast<float>((bits >> 15) != 0 ? -magnitude : magnitude);
}

void expect_same(float got, float wanted, unsigned bits) {
  if (std::isnan(wanted)) {
    EXPECT_TRUE(std::isnan(got)) << "bits " << bits;
    return;
  }
  EXPECT_EQ(got, wanted) << "bits " << bits;
  EXPECT_EQ(std::signbit(got), std::signbit(wanted)) << "bits " << bits;
}

TEST(Half, EveryHalfConvertsExactly) {
  for (unsigned bits = 0; bits < 65536; ++bits)
    expect_same(to_float(Half{static_cast<std::uint16_t>(bits)}), reference(bits, 5, 10), bits);
}

TEST(Half, EveryBFloat16ConvertsExactly) {
  for (unsigned bits = 0; bits < 65536; ++bits)
    expect_same(to_float(BFloat16{static_cast<std::uint16_t>(bits)}), reference(bits, 8, 7), bits);
}

}  // namespace
}  // namespace tacext
