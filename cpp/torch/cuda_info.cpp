#include "cuda_info.h"

#ifdef TACEXT_WITH_CUDA
#include "tacext_cuda.h"
#endif

namespace tacext {

#ifdef TACEXT_WITH_CUDA
bool has_cuda() { return true; }
int cuda_device_count() { return tacext_cuda_device_count(); }
#else
bool has_cuda() { return false; }
int cuda_device_count() { return 0; }
#endif

}  // namespace tacext
