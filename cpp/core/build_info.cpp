#include "tacext/build_info.h"

namespace tacext {

const char* version() { return TACEXT_VERSION; }

const char* simd_level() {
#if defined(__x86_64__) && !defined(TACEXT_NO_SIMD_CLONES)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace tacext
