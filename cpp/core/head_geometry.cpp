#include "head_geometry.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace tacext {
namespace {

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

/// The metric as factors of 0.5 to 1 times powers of two: products with neither overflow.
struct Metric {
  std::vector<double> factors;
  std::vector<int> exponents;

  Metric(const double* scale, std::int64_t latents)
      : factors(static_cast<std::size_t>(latents), 1.0), exponents(factors.size(), 0) {
    for (std::size_t d = 0; scale != nullptr && d < factors.size(); ++d)
      factors[d] = std::frexp(scale[d], &exponents[d]);
  }

  /// The exponent of the largest entry of a row times the metric; kNone for a row of zeros.
  static constexpr std::int64_t kNone = -100'000;
  std::int64_t largest_exponent(const double* row) const {
    std::int64_t largest = kNone;
    for (std::size_t d = 0; d < factors.size(); ++d) {
      std::int64_t bits;
      std::memcpy(&bits, row + d, sizeof bits);
      const std::int64_t exponent = (bits >> 52 & 0x7ff) - 1023 + exponents[d];
      const std::int64_t here = row[d] != 0 ? exponent : kNone;
      largest = here > largest ? here : largest;
    }
    return largest;
  }
};

/// The exponent of the middle one of the rows' largest entries: squares of what lies within 1e140
/// of it then fit into a double, on either side. 0 where the rows are near 1 as they are. Rows of
/// zeros say nothing; where the sample has no others, all rows are looked at.
int middle_exponent(const std::vector<double>& rows, std::int64_t classes, std::int64_t latents,
                    const Metric& metric) {
  constexpr std::int64_t kLookedAt = 64;  // rows, at equal distances
  constexpr int kNear = 32;
  std::vector<int> largest;
  for (std::int64_t apart = (classes + kLookedAt - 1) / kLookedAt;; apart = 1) {
    for (std::int64_t j = 0; j < classes; j += apart)
      if (const std::int64_t exponent = metric.largest_exponent(rows.data() + j * latents);
          exponent != Metric::kNone)
        largest.push_back(static_cast<int>(exponent));
    if (!largest.empty() || apart == 1) break;
  }
  if (largest.empty()) return 0;
  const auto middle = largest.begin() + static_cast<std::ptrdiff_t>(largest.size() / 2);
  std::nth_element(largest.begin(), middle, largest.end());
  return std::abs(*middle) <= kNear ? 0 : *middle;
}

/// W, centred, diag(scale) 2^-exponent. Centred first: that rounds nothing, where a scale would
/// round the common component and with it the small differences.
std::vector<double> scaled_rows(const PerturbationProblem& p, int& exponent) {
  constexpr int kFactor = 1000;  // up to here 2^exponent is itself a double
  std::vector<double> rows(p.weight, p.weight + p.classes * p.latents);
  centre(rows, p.classes, p.latents);
  const Metric metric(p.scale, p.latents);
  for (std::int64_t j = 0; p.scale != nullptr && j < p.classes; ++j)
    for (std::int64_t d = 0; d < p.latents; ++d) rows[j * p.latents + d] *= metric.factors[d];
  exponent = middle_exponent(rows, p.classes, p.latents, metric);
  if (p.scale == nullptr && exponent == 0) return rows;
  std::vector<double> powers;
  for (const int own : metric.exponents)
    powers.push_back(std::abs(own - exponent) <= kFactor ? std::ldexp(1.0, own - exponent) : 0.0);
  for (std::int64_t j = 0; j < p.classes; ++j)
    for (std::int64_t d = 0; d < p.latents; ++d) {
      double& entry = rows[j * p.latents + d];
      entry =
          powers[d] != 0 ? entry * powers[d] : std::ldexp(entry, metric.exponents[d] - exponent);
    }
  return rows;
}

bool wants_gram(const PerturbationProblem& p) {
  constexpr std::int64_t kAlways = 128;    // classes up to which it costs next to nothing
  constexpr std::int64_t kLargest = 4096;  // 128 MiB
  constexpr std::int64_t kShare = 8;       // of the classes asked from which it is worth its price
  return p.classes <= kAlways || (p.classes <= kLargest && p.count * kShare >= p.classes);
}

constexpr double kRounding = 0.5 * std::numeric_limits<double>::epsilon();

}  // namespace

HeadGeometry::HeadGeometry(const PerturbationProblem& problem, const ParallelFor& parallel_for)
    : classes_(problem.classes),
      latents_(problem.latents),
      given_(problem.weight),
      scale_(problem.scale),
      weight_(scaled_rows(problem, exponent_)),
      packed_(weight_.data(), classes_, latents_),
      row_squares_(static_cast<std::size_t>(classes_)),
      row_lengths_(row_squares_.size()),
      // A sum of D products in any order is off by at most D roundings of each; some more are for
      // the lengths and the difference. Terms of one sign in one order come to about sqrt(D) / 4
      // where roundings are as good as random, and others stay below.
      most_product_noise_(kRounding * (8 + static_cast<double>(latents_))),
      usual_product_noise_(kRounding * (8 + std::sqrt(static_cast<double>(latents_)))) {
  if (wants_gram(problem))
    gram_ = gram_matrix(packed_, weight_.data(), classes_, latents_, parallel_for);
  for (std::int64_t j = 0; j < classes_; ++j) {
    row_squares_[j] = product(j, j);
    row_lengths_[j] = std::sqrt(row_squares_[j]);
  }
}

double HeadGeometry::in_scaled_unit(double entry, std::int64_t d) const {
  int exponent = 0;
  const double factor = scale_ != nullptr ? std::frexp(scale_[d], &exponent) : 1.0;
  return std::ldexp(entry * factor, exponent - exponent_);
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
