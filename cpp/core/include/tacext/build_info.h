#pragma once

#include "tacext/export.h"

namespace tacext {

TACEXT_API const char* version();

/// The instruction set that the CPU kernels use on this machine: "x86-64-v4", "x86-64-v3" or
/// "baseline".
TACEXT_API const char* simd_level();

/// Whether the CUDA kernels were built in.
TACEXT_API bool has_cuda();

/// CUDA devices at hand; 0 without the kernels, a driver or a device.
TACEXT_API int cuda_device_count();

}  // namespace tacext
