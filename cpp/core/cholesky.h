#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace tacext {

/// The lower factor L of a growing and shrinking positive definite matrix, rows packed.
class PackedCholesky {
 public:
  std::int64_t size() const { return size_; }
  /// Entries 0 .. i of row i.
  const double* row(std::int64_t i) const { return rows_.data() + i * (i + 1) / 2; }

  /// x = L^-1 x
  void solve_lower(double* x) const;
  /// x = L^-T x
  void solve_upper(double* x) const;

  /// Appends the row [y, diagonal], where L y is the new column and y = L^-1 column.
  void append(const double* y, double diagonal);

  /// Removes row and column `index` of L L^T. Every Givens rotation (c, s) of columns i and i + 1
  /// is passed to `rotate(i, c, s)`, for a caller whose basis must turn along.
  template <class Rotate>
  void remove(std::int64_t index, Rotate rotate) {
    --size_;
    // Until packed, row i of the new factor lies where row i + 1 of the old one lay, one entry too
    // long: each rotation turns that entry into the diagonal before it.
    for (std::int64_t i = index; i < size_; ++i) {
      const auto [c, s] = turn_superdiagonal(i);
      rotate(i, c, s);
    }
    pack_after_removal(index);
  }

 private:
  struct Rotation {
    double cosine, sine;
  };
  double* mutable_row(std::int64_t i) { return rows_.data() + i * (i + 1) / 2; }
  Rotation turn_superdiagonal(std::int64_t i);
  void pack_after_removal(std::int64_t index);

  std::int64_t size_ = 0;
  std::vector<double> rows_;
};

}  // namespace tacext
