#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

// Stands in for CUDA's own header, so that the kernels compile as plain C++ and run on the host:
// blocks one after the other, the threads of a block as fibers that switch at barriers. It shows
// wrong indices, wrong arithmetic, missing barriers and barriers that not all threads reach; it
// does not show what several blocks at once could do to each other.

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Those of the running fiber.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

namespace cuda_on_host {

/// The order in which a block's warps, and the threads in them, run; each warp goes as far as it
/// can before the next one moves. A kernel whose result depends on the order lacks a barrier.
enum class Order { kForward, kBackward };
void set_order(Order order);

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
void block_barrier();
/// `value`, of at most 8 bytes, as thread `lane ^ mask` of the warp holds it.
std::uint64_t exchange(std::uint64_t value, int mask);

}  // namespace cuda_on_host

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_on_host::run(*config, [&] { kernel(arguments...); });
}

inline cudaError_t cudaMemsetAsync(void* memory, int byte, std::size_t count, cudaStream_t) {
  std::memset(memory, byte, count);
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int*) { return cudaErrorNoDevice; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error on the host"; }

inline void __syncthreads() { cuda_on_host::block_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_on_host::exchange(bits, mask);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T atomicCAS(T* address, T expected, T wanted) {
  const T found = *address;
  if (found == expected) *address = wanted;
  return found;
}

template <class T>
T atomicMin(T* address, T value) {
  const T found = *address;
  if (value < found) *address = value;
  return found;
}

namespace cuda_on_host {
template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
}  // namespace cuda_on_host

inline int __float_as_int(float v) { return cuda_on_host::bits_as<int>(v); }
inline float __int_as_float(int v) { return cuda_on_host::bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return cuda_on_host::bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_on_host::bits_as<double>(v); }
