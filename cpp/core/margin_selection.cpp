#include "margin_selection.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "simd.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if TACEXT_HAS_SIMD_CLONES
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace tacext::v4 {
#define TACEXT_KERNEL_BYTES 64
constexpr int kBytes = TACEXT_KERNEL_BYTES;
#include "margin_selection.inl"
#undef TACEXT_KERNEL_BYTES
}  // namespace tacext::v4
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace tacext::v3 {
#define TACEXT_KERNEL_BYTES 32
constexpr int kBytes = TACEXT_KERNEL_BYTES;
#include "margin_selection.inl"
#undef TACEXT_KERNEL_BYTES
}  // namespace tacext::v3
#pragma GCC pop_options
#endif
namespace tacext::baseline {
#define TACEXT_KERNEL_BYTES 16
constexpr int kBytes = TACEXT_KERNEL_BYTES;
#include "margin_selection.inl"
#undef TACEXT_KERNEL_BYTES
}  // namespace tacext::baseline

namespace tacext {

namespace {
constexpr std::int64_t kLanesAtMost = 16;  // floats that one vector may append at once
}

template <class Margin>
LargestKept<Margin>::LargestKept(std::int64_t keep)
    : keep_(keep),
      capacity_(2 * keep + 64),
      values_(static_cast<std::size_t>(capacity_ + kLanesAtMost)) {
  start();
}

template <class Margin>
void LargestKept<Margin>::start(const Margin* values, std::int64_t size) {
  bound = -std::numeric_limits<Margin>::infinity();
  count = 0;
  for (std::int64_t i = 0; i < size; ++i)
    if (values[i] > bound) values_[count++] = values[i];
  if (count == keep_) bound = *std::min_element(values_.begin(), values_.begin() + count);
}

template <class Margin>
void LargestKept<Margin>::drop() {
  if (count < keep_) return;
  std::nth_element(values_.begin(), values_.begin() + keep_ - 1, values_.begin() + count,
                   std::greater<>());
  count = keep_;
  bound = values_[keep_ - 1];
}

template <class Margin>
void LargestKept<Margin>::add_differences(const Margin* a, const Margin* b, std::int64_t size) {
#if TACEXT_HAS_SIMD_CLONES
  if (simd_width() == 64) return v4::add_differences(*this, a, b, size);
  if (simd_width() == 32) return v3::add_differences(*this, a, b, size);
#endif
  baseline::add_differences(*this, a, b, size);
}

template <class Margin>
void LargestKept<Margin>::write(Margin* values) {
  drop();
  std::copy_n(values_.begin(), count, values);
  std::fill(values + count, values + keep_, -std::numeric_limits<Margin>::infinity());
}

template <class Margin>
Margin LargestKept<Margin>::smallest_kept() {
  drop();
  return bound;
}

template class LargestKept<float>;
template class LargestKept<double>;

}  // namespace tacext
