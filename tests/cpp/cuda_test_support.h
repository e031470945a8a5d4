#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstring>
#include <type_traits>

#include "tacext/half.h"
#include "tacext_cuda.h"

// For kernels that run on the host (see cuda_on_host/cuda_runtime.h).
namespace tacext::test {

template <class T>
constexpr tacext_cuda_type kType = std::is_same_v<T, float>    ? TACEXT_CUDA_FLOAT32
                                   : std::is_same_v<T, double> ? TACEXT_CUDA_FLOAT64
                                   : std::is_same_v<T, Half>   ? TACEXT_CUDA_FLOAT16
                                                               : TACEXT_CUDA_BFLOAT16;

/// Runs `launch` with the threads of a block in either order; both must give the same bits.
template <class Result, class Launch>
Result in_both_orders(const Launch& launch) {
  cuda_on_host::set_order(cuda_on_host::Order::kBackward);
  const Result backward = launch();
  cuda_on_host::set_order(cuda_on_host::Order::kForward);
  Result forward = launch();
  EXPECT_EQ(std::memcmp(forward.data(), backward.data(), forward.size() * sizeof(forward[0])), 0);
  return forward;
}

}  // namespace tacext::test
