#pragma once

// TACEXT_SIMD_CLONES compiles a function once for each instruction set; the loader picks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(TACEXT_NO_SIMD_CLONES)
#define TACEXT_SIMD_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TACEXT_SIMD_CLONES
#endif
#define TACEXT_INLINE inline __attribute__((always_inline))
