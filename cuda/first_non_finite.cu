#include <algorithm>

#include "launch.cuh"

namespace tacext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kBlocks = 1024;

// Each thread looks at every (blocks * kThreads)-th value and offers the first bad one it meets;
// the smallest index wins, whatever the order. `first` starts as all ones: none.
__global__ void first_non_finite_kernel(const double* __restrict__ values, std::int64_t count,
                                        unsigned long long* first) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step)
    if (values[i] - values[i] != 0) {  // 0 for a finite value, NaN for the rest
      atomicMin(first, static_cast<unsigned long long>(i));
      return;
    }
}

}  // namespace
}  // namespace tacext::cuda

extern "C" int tacext_cuda_first_non_finite(const double* values, std::int64_t count,
                                            std::int64_t* first, void* stream) {
  using namespace tacext::cuda;
  Launcher launcher(stream);
  launcher.fill_bytes(first, 0xff, sizeof *first);
  if (count > 0)
    launcher.run(first_non_finite_kernel, grid(std::min(ceil_div(count, kThreads), kBlocks)),
                 dim3(kThreads), values, count, reinterpret_cast<unsigned long long*>(first));
  return launcher.error();
}
