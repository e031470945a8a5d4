#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(TACEXT_NO_SIMD_CLONES)
#define TACEXT_HAS_SIMD_CLONES 1
// Compiles a function once for each instruction set; the loader picks.
#define TACEXT_SIMD_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TACEXT_HAS_SIMD_CLONES 0
#define TACEXT_SIMD_CLONES
#endif
#define TACEXT_INLINE inline __attribute__((always_inline))
#define TACEXT_NOINLINE __attribute__((noinline))

namespace tacext {

/// Where a kernel has another shape for each instruction set, target_clones cannot help: such
/// kernels are compiled as templates under one TACEXT_TARGET each and picked by simd_width().
#if TACEXT_HAS_SIMD_CLONES
#define TACEXT_TARGET(arch) __attribute__((target(arch)))
#endif

/// Bytes of the widest vector register that is compiled for and present.
inline int simd_width() {
#if TACEXT_HAS_SIMD_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 64;
  if (__builtin_cpu_supports("x86-64-v3")) return 32;
#endif
  return 16;
}

}  // namespace tacext
