#include "margin_tiles.h"

#include <algorithm>
#include <limits>

#include "simd.h"

// The kernels are the same text for every instruction set, with the register tile that fills its
// registers: 32 of 64 bytes, 16 of 32, 16 of 16. target_clones cannot do that, and would let GCC
// take vectors wider than the default instruction set's apart before it makes the clones.
#if TACEXT_SIMD_TARGETS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace tacext::v4 {
#define TACEXT_KERNEL_BYTES 64
constexpr int kBytes = TACEXT_KERNEL_BYTES, kJ = 3, kK = 4;
#include "margin_tiles.inl"
#undef TACEXT_KERNEL_BYTES
}  // namespace tacext::v4
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace tacext::v3 {
#define TACEXT_KERNEL_BYTES 32
constexpr int kBytes = TACEXT_KERNEL_BYTES, kJ = 2, kK = 3;
#include "margin_tiles.inl"
#undef TACEXT_KERNEL_BYTES
}  // namespace tacext::v3
#pragma GCC pop_options
#endif
namespace tacext::baseline {
#define TACEXT_KERNEL_BYTES 16
constexpr int kBytes = TACEXT_KERNEL_BYTES, kJ = 2, kK = 3;
#include "margin_tiles.inl"
#undef TACEXT_KERNEL_BYTES
}  // namespace tacext::baseline

namespace tacext {
namespace {

template <class Margin>
void pick_direct(const MarginTile<Margin>& tile) {
#if TACEXT_SIMD_TARGETS
  if (simd_width() == 64) return v4::direct(tile);
  if (simd_width() == 32) return v3::direct(tile);
#endif
  baseline::direct(tile);
}

template <class Margin>
void pick_screened(const MarginTile<Margin>& tile) {
#if TACEXT_SIMD_TARGETS
  if (simd_width() == 64) return v4::screened(tile);
  if (simd_width() == 32) return v3::screened(tile);
#endif
  baseline::screened(tile);
}

}  // namespace

void margins_direct(const MarginTile<float>& tile) { pick_direct(tile); }
void margins_direct(const MarginTile<double>& tile) { pick_direct(tile); }
void margins_screened(const MarginTile<float>& tile) { pick_screened(tile); }
void margins_screened(const MarginTile<double>& tile) { pick_screened(tile); }

}  // namespace tacext
