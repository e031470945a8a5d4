#pragma once

#include "tacext/half.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return tacext::to_float(tacext::BFloat16{value.bits});
}
