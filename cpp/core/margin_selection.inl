// The kernel of margin_selection.cpp, for one instruction set.

#include "lanes.inl"

template <class Margin>
void add_differences(LargestKept<Margin>& kept, const Margin* a, const Margin* b,
                     std::int64_t count) {
  using Vector = typename Lanes<Margin>::type;
  constexpr std::int64_t lanes = kBytes / sizeof(Margin);
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    Vector x, y;
    load(x, a + i);
    load(y, b + i);
    const Vector d = x - y;
    std::uint64_t above = lanes_above<Margin>(d, kept.bound);
    if (above == 0) continue;
    for (; above != 0; above &= above - 1)
      kept.values()[kept.count++] = d[__builtin_ctzll(above)] + Margin{0};
    if (kept.count >= kept.capacity()) kept.drop();
  }
  for (; i < count; ++i) {
    const Margin d = a[i] - b[i];
    if (!(d > kept.bound)) continue;
    kept.values()[kept.count++] = d + Margin{0};
    if (kept.count >= kept.capacity()) kept.drop();
  }
}
