#include "cholesky.h"

#include <algorithm>

#include "linear_algebra.h"

namespace tacext {

void PackedCholesky::solve_lower(double* x) const {
  for (std::int64_t i = 0; i < size_; ++i) x[i] = (x[i] - dot(row(i), x, i)) / row(i)[i];
}

void PackedCholesky::solve_upper(double* x) const {
  for (std::int64_t i = size_ - 1; i >= 0; --i) {
    x[i] /= row(i)[i];
    add_scaled(-x[i], row(i), i, x);
  }
}

void PackedCholesky::append(const double* y, double diagonal) {
  rows_.insert(rows_.end(), y, y + size_);
  rows_.push_back(diagonal);
  ++size_;
}

PackedCholesky::Rotation PackedCholesky::turn_superdiagonal(std::int64_t i) {
  const double* const pivot = row(i + 1);  // old row i + 1, with entries 0 .. i + 1
  const double radius = std::hypot(pivot[i], pivot[i + 1]);
  const Rotation rotation{pivot[i] / radius, pivot[i + 1] / radius};
  for (std::int64_t r = i; r < size_; ++r) {
    double* const entries = mutable_row(r + 1) + i;
    const double left = entries[0], right = entries[1];
    entries[0] = rotation.cosine * left + rotation.sine * right;
    entries[1] = rotation.cosine * right - rotation.sine * left;
  }
  return rotation;
}

void PackedCholesky::pack_after_removal(std::int64_t index) {
  for (std::int64_t i = index; i < size_; ++i) std::copy_n(row(i + 1), i + 1, mutable_row(i));
  rows_.resize(static_cast<std::size_t>(size_ * (size_ + 1) / 2));
}

}  // namespace tacext
