#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tacext_cuda.h"

// What every kernel's launch shares: grid sizes, errors, element types.
namespace tacext::cuda {

constexpr std::int64_t kLargestGridYZ = 65535;  // grid.y and grid.z; grid.x reaches 2^31 - 1

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

/// Too many blocks stay too many: the launch fails where a bare cast would wrap to a few.
inline dim3 grid(std::int64_t x, std::int64_t y = 1, std::int64_t z = 1) {
  const auto blocks = [](std::int64_t count) {
    return static_cast<unsigned>(
        std::min<std::int64_t>(count, std::numeric_limits<unsigned>::max()));
  };
  return dim3(blocks(x), blocks(y), blocks(z));
}

/// Launches kernels one after the other on a stream; after the first error it launches no more.
class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
    if (error_ != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }

  void fill_bytes(void* memory, int byte, std::int64_t count) {
    if (error_ == cudaSuccess)
      error_ = cudaMemsetAsync(memory, byte, static_cast<std::size_t>(count), stream_);
  }

  int error() const { return static_cast<int>(error_); }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

__device__ inline float to_float(float value) { return value; }
__device__ inline double to_float(double value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

/// Calls body with a null pointer to `const T`, where T is the element type.
template <class Body>
void dispatch(tacext_cuda_type type, const Body& body) {
  switch (type) {
    case TACEXT_CUDA_FLOAT32:
      return body(static_cast<const float*>(nullptr));
    case TACEXT_CUDA_FLOAT64:
      return body(static_cast<const double*>(nullptr));
    case TACEXT_CUDA_FLOAT16:
      return body(static_cast<const __half*>(nullptr));
    case TACEXT_CUDA_BFLOAT16:
      return body(static_cast<const __nv_bfloat16*>(nullptr));
  }
}

}  // namespace tacext::cuda
