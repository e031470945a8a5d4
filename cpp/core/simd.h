#pragma once

#include <algorithm>
#ifdef __x86_64__
#include <immintrin.h>
#endif

// TACEXT_SIMD_CLONES compiles a function once for each instruction set; the loader picks.
// Where a kernel has another shape for each instruction set, that cannot help: it is then written
// into an .inl file which is compiled under each `#pragma GCC target`, and picked by simd_width().
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TACEXT_SIMD_TARGETS 1
#else
#define TACEXT_SIMD_TARGETS 0
#endif
#if TACEXT_SIMD_TARGETS && !defined(TACEXT_NO_SIMD_CLONES)
#define TACEXT_SIMD_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TACEXT_SIMD_CLONES
#endif
#define TACEXT_INLINE inline __attribute__((always_inline))
#define TACEXT_NOINLINE __attribute__((noinline))

namespace tacext {

/// Bytes of the widest vector register that is compiled for and present.
inline int present_simd_width() {
#if TACEXT_SIMD_TARGETS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 64;
  if (__builtin_cpu_supports("x86-64-v3")) return 32;
#endif
  return 16;
}

/// For tests, which lower it to run what other machines run.
inline int simd_width_limit = 64;

/// Bytes of the vector registers to use.
inline int simd_width() {
  static const int present = present_simd_width();
  return std::min(present, simd_width_limit);
}

}  // namespace tacext
