#pragma once

#include "tacext/export.h"

namespace tacext {

/// Whether the CUDA kernels were built in.
TACEXT_API bool has_cuda();

/// CUDA devices at hand; 0 without the kernels, a driver or a device.
TACEXT_API int cuda_device_count();

}  // namespace tacext
