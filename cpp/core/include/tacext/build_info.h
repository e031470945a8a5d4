#pragma once

#include "tacext/export.h"

namespace tacext {

TACEXT_API const char* version();

/// The instruction set that the CPU kernels use on this machine: "x86-64-v4", "x86-64-v3" or
/// "baseline".
TACEXT_API const char* simd_level();

}  // namespace tacext
