// The kernels of margin_selection.cpp, for one instruction set.

#include "lanes.inl"

// Appends the lanes in `mask`; up to a vector's length of space behind them is overwritten.
template <class Margin>
TACEXT_INLINE std::int64_t append_lanes(const typename Lanes<Margin>::type& d, std::uint64_t mask,
                                        Margin* to) {
#if defined(__x86_64__) && TACEXT_KERNEL_BYTES == 64
  if constexpr (sizeof(Margin) == 4)
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)d));
  else
    _mm512_storeu_pd(to, _mm512_maskz_compress_pd(static_cast<__mmask8>(mask), (__m512d)d));
#else
  Margin lanes[kBytes / sizeof(Margin)];
  __builtin_memcpy(lanes, &d, kBytes);
  Margin* end = to;
  for (std::uint64_t left = mask; left != 0; left &= left - 1)
    *end++ = lanes[__builtin_ctzll(left)];
#endif
  return __builtin_popcountll(mask);
}

template <class Margin>
void add_differences(LargestKept<Margin>& kept, const Margin* a, const Margin* b,
                     std::int64_t count) {
  using Vector = typename Lanes<Margin>::type;
  constexpr std::int64_t lanes = kBytes / sizeof(Margin);
  constexpr bool kCompresses = kBytes == 64;  // then appending nothing is cheaper than a branch
  std::int64_t i = 0;
  while (i + lanes <= count) {
    std::int64_t size = kept.count;
    const Margin bound = kept.bound;
    Margin* const values = kept.values();
    const std::int64_t full = kept.capacity();
    for (; i + lanes <= count && size < full; i += lanes) {
      Vector x, y;
      load(x, a + i);
      load(y, b + i);
      const Vector d = x - y + Margin{0};
      const std::uint64_t above = lanes_above<Margin>(d, bound);
      if (kCompresses || above != 0) size += append_lanes<Margin>(d, above, values + size);
    }
    kept.count = size;
    if (size >= full) kept.drop();
  }
  for (; i < count; ++i) {
    const Margin d = a[i] - b[i] + Margin{0};
    if (!(d > kept.bound)) continue;
    kept.values()[kept.count++] = d;
    if (kept.count >= kept.capacity()) kept.drop();
  }
}

template <class Margin>
void extremes(const Margin* values, std::int64_t count, Margin& lowest, Margin& highest) {
  Margin low = values[0], high = values[0];
#pragma omp simd reduction(min : low) reduction(max : high)
  for (std::int64_t i = 0; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  lowest = low;
  highest = high;
}

template <class Margin>
std::int64_t count_at_least(const Margin* values, std::int64_t count, Margin bound) {
  // In the width of the values, so that a lane counts for a lane; count is far below its limit.
  std::conditional_t<sizeof(Margin) == 4, std::int32_t, std::int64_t> found = 0;
  for (std::int64_t i = 0; i < count; ++i) found += values[i] >= bound;
  return found;
}
