#pragma once

#include <cstdint>
#include <cstring>

#include "tacext/export.h"

namespace tacext {

/// The 16 bits of an IEEE half (torch.float16), for reading only.
struct TACEXT_API Half {
  std::uint16_t bits;
};

/// The 16 bits of a bfloat16 (torch.bfloat16), for reading only.
struct TACEXT_API BFloat16 {
  std::uint16_t bits;
};

inline float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(BFloat16 value) {
  return float_from_bits(static_cast<std::uint32_t>(value.bits) << 16);
}

/// Exact, with subnormals, infinities and NaN; no branch, so that a loop over it vectorises.
inline float to_float(Half value) {
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  // Rebias the exponent; the all-ones exponent (infinity, NaN) is rebiased once more.
  std::uint32_t normal = (magnitude << 13) + (112u << 23);
  normal += (magnitude >= 0x7c00u) ? (112u << 23) : 0u;
  // A subnormal half is an integer count of 2^-24.
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  std::uint32_t subnormal_bits;
  std::memcpy(&subnormal_bits, &subnormal, sizeof subnormal_bits);
  return float_from_bits(sign | (magnitude < 0x0400u ? subnormal_bits : normal));
}

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }

}  // namespace tacext
