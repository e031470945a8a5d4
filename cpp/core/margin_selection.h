#pragma once

#include <cstdint>
#include <vector>

namespace tacext {

/// The `keep` largest of a stream of differences, in memory of that order.
///
/// Values above the bound, the keep-th largest so far, are appended; when the space is full, all
/// but the keep largest are dropped and the bound rises to the smallest of them.
template <class Margin>
class LargestKept {
 public:
  explicit LargestKept(std::int64_t keep);

  /// Starts from values that are already known, at most `keep`; -infinity stands for none.
  void start(const Margin* values, std::int64_t count);
  void start() { start(nullptr, 0); }

  /// Adds a[i] - b[i] for i in [0, count), with +0 for a difference of -0.
  void add_differences(const Margin* a, const Margin* b, std::int64_t count);

  /// Writes the largest, `keep` of them, in no order, -infinity where there were fewer.
  void write(Margin* values);

  /// The keep-th largest; there must have been that many.
  Margin smallest_kept();

  // For the kernel: space for a whole vector behind `capacity`.
  Margin* values() { return values_.data(); }
  std::int64_t capacity() const { return capacity_; }
  std::int64_t count = 0;
  Margin bound;
  void drop();

 private:
  std::int64_t keep_, capacity_;
  std::vector<Margin> values_;
};

}  // namespace tacext
