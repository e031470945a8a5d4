#pragma once

#include "tacext/half.h"

struct __half {
  std::uint16_t bits;
};
inline float __half2float(__half value) { return tacext::to_float(tacext::Half{value.bits}); }
