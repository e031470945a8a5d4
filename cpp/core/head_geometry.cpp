#include "head_geometry.h"

#include <cmath>

namespace tacext {
namespace {

double squared_length(const std::vector<double>& values) {
  return dot(values.data(), values.data(), static_cast<std::int64_t>(values.size()));
}

std::vector<double> scaled_rows(const PerturbationProblem& p) {
  std::vector<double> rows(p.weight, p.weight + p.classes * p.latents);
  if (p.scale != nullptr)
    for (std::int64_t j = 0; j < p.classes; ++j)
      for (std::int64_t d = 0; d < p.latents; ++d) rows[j * p.latents + d] *= p.scale[d];

  std::vector<double> mean(static_cast<std::size_t>(p.latents), 0.0);
  for (std::int64_t j = 0; j < p.classes; ++j)
    add_scaled(1.0 / static_cast<double>(p.classes), rows.data() + j * p.latents, p.latents,
               mean.data());
  // sum |w_j - mean|^2 = sum |w_j|^2 - C |mean|^2. Centring rounds, so it must pay: where a few
  // huge rows make the mean, it would only blur the small ones.
  const double common = static_cast<double>(p.classes) * squared_length(mean);
  if (common > 0.75 * squared_length(rows))
    for (std::int64_t j = 0; j < p.classes; ++j)
      add_scaled(-1.0, mean.data(), p.latents, rows.data() + j * p.latents);
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
      weight_(scaled_rows(problem)),
      packed_(weight_.data(), classes_, latents_),
      row_squares_(static_cast<std::size_t>(classes_)) {
  if (wants_gram(problem))
    gram_ = gram_matrix(packed_, weight_.data(), classes_, latents_, parallel_for);
  for (std::int64_t j = 0; j < classes_; ++j) row_squares_[j] = product(j, j);
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
    double square = target - 2 * gram_row[j] + row_squares_[j];
    if (square < kCancelled * (target + row_squares_[j])) {
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
