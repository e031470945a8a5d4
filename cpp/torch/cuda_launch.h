#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "tacext_cuda.h"
#include "tensor_checks.h"

// What a kernel's launch needs of torch: the device, the stream, the element type, errors.
namespace tacext {

/// torch's current stream on a device. Looked up at run time: libtacext.so does not link
/// libtorch_cuda.so, so that it loads with a CPU build of torch too.
inline void* current_cuda_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr,
                  "tacext: torch: expected a CUDA build, got one without CUDA streams; install a "
                  "CUDA build of torch, or move the tensors with .cpu()");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

/// Makes a tensor's device current for its lifetime, and knows torch's stream there.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor)
      : guard_(tensor.get_device_index()),
        stream_(current_cuda_stream(tensor.get_device_index())) {}

  void* stream() const { return stream_; }

  void check(const char* operation, int error) const {
    STD_TORCH_CHECK(error == 0, operation, ": device: expected the kernels to run, got CUDA error ",
                    error, " (", tacext_cuda_error_string(error),
                    "); free GPU memory or update the driver, or move the tensors with .cpu()");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

inline tacext_cuda_type cuda_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return TACEXT_CUDA_FLOAT32;
    case ScalarType::Double:
      return TACEXT_CUDA_FLOAT64;
    case ScalarType::Half:
      return TACEXT_CUDA_FLOAT16;
    default:
      return TACEXT_CUDA_BFLOAT16;
  }
}

}  // namespace tacext
