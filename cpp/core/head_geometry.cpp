#include "head_geometry.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace tacext {
namespace {

/// The exponent of the middle one of the rows' largest entries: squares of what lies within 1e140
/// of it then fit into a double, on either side. 0 where the rows are near 1 as they are.
int middle_exponent(const std::vector<double>& rows, std::int64_t classes, std::int64_t latents) {
  constexpr std::int64_t kLookedAt = 64;  // rows, at equal distances
  constexpr int kNear = 32;
  std::vector<double> largest;
  for (std::int64_t j = 0; j < classes; j += (classes + kLookedAt - 1) / kLookedAt)
    if (const double entry = largest_magnitude(rows.data() + j * latents, latents); entry > 0)
      largest.push_back(entry);
  if (largest.empty()) return 0;
  const auto middle = largest.begin() + static_cast<std::ptrdiff_t>(largest.size() / 2);
  std::nth_element(largest.begin(), middle, largest.end());
  const int exponent = std::isfinite(*middle) ? std::ilogb(*middle) : 0;
  return std::abs(exponent) <= kNear ? 0 : exponent;
}

/// w - mean is exact where w lies between mean / 2 and 2 mean (Sterbenz): latents in which all
/// entries do are centred. Others keep their small entries, which a mean of huge ones would blur.
void centre(std::vector<double>& rows, std::int64_t classes, std::int64_t latents) {
  constexpr std::int64_t kStrip = 8;  // rows after which most heads have no such latent left
  const auto size = static_cast<std::size_t>(latents);
  std::vector<double> mean(size, 0.0), low(size, HUGE_VAL), high(size, -HUGE_VAL);
  for (std::int64_t begin = 0; begin < classes; begin += kStrip) {
    for (std::int64_t j = begin; j < std::min(begin + kStrip, classes); ++j)
      gather_range(rows.data() + j * latents, latents, mean.data(), low.data(), high.data());
    bool possible = false;
    for (std::size_t d = 0; d < size && !possible; ++d)
      possible = low[d] > 0 ? high[d] < 4 * low[d] : low[d] > 4 * high[d];
    if (!possible) return;
  }
  for (std::size_t d = 0; d < size; ++d) {
    mean[d] /= static_cast<double>(classes);
    const double half = 0.5 * mean[d], twice = 2 * mean[d];
    if (!(std::min(half, twice) <= low[d] && high[d] <= std::max(half, twice))) mean[d] = 0;
  }
  for (std::int64_t j = 0; j < classes; ++j)
    add_scaled(-1.0, mean.data(), latents, rows.data() + j * latents);
}

/// W diag(scale) 2^-exponent, centred.
std::vector<double> scaled_rows(const PerturbationProblem& p, int& exponent) {
  std::vector<double> rows(p.weight, p.weight + p.classes * p.latents);
  exponent = 0;
  if (p.scale != nullptr) {  // at most 1 each, so that no product overflows
    exponent = std::ilogb(largest_magnitude(p.scale, p.latents)) + 1;
    std::vector<double> scale(static_cast<std::size_t>(p.latents));
    multiply_by_power_of_two(p.scale, p.latents, -exponent, scale.data());
    for (std::int64_t j = 0; j < p.classes; ++j)
      for (std::int64_t d = 0; d < p.latents; ++d) rows[j * p.latents + d] *= scale[d];
  }
  if (const int middle = middle_exponent(rows, p.classes, p.latents); middle != 0) {
    multiply_by_power_of_two(rows.data(), p.classes * p.latents, -middle, rows.data());
    exponent += middle;
  }
  centre(rows, p.classes, p.latents);
  return rows;
}

bool wants_gram(const PerturbationProblem& p) {
  constexpr std::int64_t kAlways = 128;    // classes up to which it costs next to nothing
  constexpr std::int64_t kLargest = 4096;  // 128 MiB
  constexpr std::int64_t kShare = 8;       // of the classes asked from which it is worth its price
  return p.classes <= kAlways || (p.classes <= kLargest && p.count * kShare >= p.classes);
}

}  // namespace

HeadGeometry::HeadGeometry(const PerturbationProblem& problem, const ParallelFor& parallel_for)
    : classes_(problem.classes),
      latents_(problem.latents),
      weight_(scaled_rows(problem, exponent_)),
      packed_(weight_.data(), classes_, latents_),
      row_squares_(static_cast<std::size_t>(classes_)),
      row_lengths_(row_squares_.size()),
      // A sum of D products in one order rounds by D eps at worst; terms of one sign come to about
      // sqrt(D) / 4, others stay below.
      product_noise_(std::numeric_limits<double>::epsilon() *
                     (4 + 0.5 * std::sqrt(static_cast<double>(latents_)))) {
  if (wants_gram(problem))
    gram_ = gram_matrix(packed_, weight_.data(), classes_, latents_, parallel_for);
  for (std::int64_t j = 0; j < classes_; ++j) {
    row_squares_[j] = product(j, j);
    row_lengths_[j] = std::sqrt(row_squares_[j]);
  }
}

double HeadGeometry::constraint_dot_size(std::int64_t k, std::int64_t j, const double* s) const {
  double sum = 0;
  for (std::int64_t d = 0; d < latents_; ++d) sum += std::fabs((row(k)[d] - row(j)[d]) * s[d]);
  return sum;
}

std::vector<double> HeadGeometry::squared_lengths(std::int64_t k, const double* gram_row) const {
  constexpr double kCancelled = 1e-6;
  std::vector<double> squares(static_cast<std::size_t>(classes_));
  const double target = row_squares_[k];
  for (std::int64_t j = 0; j < classes_; ++j) {
    const double own = row_squares_[j];
    double square = target - 2 * gram_row[j] + own;
    if (square < kCancelled * (target + own)) {
      square = 0;
      for (std::int64_t d = 0; d < latents_; ++d) {
        const double difference = row(k)[d] - row(j)[d];
        square += difference * difference;
      }
    }
    squares[j] = square;
  }
  return squares;
}

}  // namespace tacext
