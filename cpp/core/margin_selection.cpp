#include "margin_selection.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd.h"

#if TACEXT_SIMD_TARGETS
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

template <class Margin>
std::int64_t count_at_least(const Margin* values, std::int64_t count, Margin bound) {
#if TACEXT_SIMD_TARGETS
  if (simd_width() == 64) return v4::count_at_least(values, count, bound);
  if (simd_width() == 32) return v3::count_at_least(values, count, bound);
#endif
  return baseline::count_at_least(values, count, bound);
}

template <class Margin>
void extremes(const Margin* values, std::int64_t count, Margin& lowest, Margin& highest) {
#if TACEXT_SIMD_TARGETS
  if (simd_width() == 64) return v4::extremes(values, count, lowest, highest);
  if (simd_width() == 32) return v3::extremes(values, count, lowest, highest);
#endif
  baseline::extremes(values, count, lowest, highest);
}

// Floating-point numbers in their order as integers (no NaN, no -0), and back.
template <class Margin>
using Key = std::conditional_t<sizeof(Margin) == 4, std::int32_t, std::int64_t>;

template <class Margin>
Key<Margin> key_of(Margin value) {
  Key<Margin> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits >= 0 ? bits : std::numeric_limits<Key<Margin>>::min() - bits;
}

template <class Margin>
Margin value_of(Key<Margin> key) {
  const Key<Margin> bits = key >= 0 ? key : std::numeric_limits<Key<Margin>>::min() - key;
  Margin value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// The rank-th largest, by bisection over the numbers between the extremes: every step is one
/// vectorized count, without the branches that make nth_element slow on values in random order.
template <class Margin>
Margin ranked(const Margin* values, std::int64_t count, std::int64_t rank) {
  Margin lowest, highest;
  extremes(values, count, lowest, highest);
  Key<Margin> low = key_of(lowest), high = key_of(highest);  // the answer is within [low, high]
  while (low < high) {
    // Rounded up; the difference of keys of either sign needs the wider unsigned type.
    const auto span = static_cast<std::make_unsigned_t<Key<Margin>>>(high) -
                      static_cast<std::make_unsigned_t<Key<Margin>>>(low);
    const Key<Margin> middle = static_cast<Key<Margin>>(
        static_cast<std::make_unsigned_t<Key<Margin>>>(low) + (span / 2 + span % 2));
    if (count_at_least(values, count, value_of<Margin>(middle)) >= rank)
      low = middle;
    else
      high = middle - 1;
  }
  return value_of<Margin>(low);
}

}  // namespace

template <class Margin>
LargestKept<Margin>::LargestKept(std::int64_t keep)
    : keep_(keep),
      capacity_(2 * keep + 256),
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
  bound = ranked(values_.data(), count, keep_);
  std::int64_t above = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Margin value = values_[i];
    values_[above] = value;
    above += value > bound;
  }
  std::fill(values_.begin() + above, values_.begin() + keep_, bound);
  count = keep_;
}

template <class Margin>
void LargestKept<Margin>::add_differences(const Margin* a, const Margin* b, std::int64_t size) {
#if TACEXT_SIMD_TARGETS
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
