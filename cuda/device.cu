#include <cuda_runtime.h>

#include "tacext_cuda.h"

extern "C" int tacext_cuda_device_count(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver is an answer here; do not leave it to the next launch's check
  return 0;
}

extern "C" const char* tacext_cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
