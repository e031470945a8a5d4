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

}  // namespace

HeadGeometry::HeadGeometry(const PerturbationProblem& problem, const ParallelFor& parallel_for)
    : classes_(problem.classes),
      latents_(problem.latents),
      weight_(scaled_rows(problem)),
      packed_(weight_.data(), classes_, latents_),
      gram_(gram_matrix(packed_, weight_.data(), classes_, latents_, parallel_for)) {}

double HeadGeometry::constraint_dot_size(std::int64_t k, std::int64_t j, const double* s) const {
  double sum = 0;
  for (std::int64_t d = 0; d < latents_; ++d) sum += std::fabs((row(k)[d] - row(j)[d]) * s[d]);
  return sum;
}

std::vector<double> HeadGeometry::squared_norms(std::int64_t k) const {
  constexpr double kCancelled = 1e-6;
  std::vector<double> norms(static_cast<std::size_t>(classes_));
  const double* const target = gram_row(k);
  for (std::int64_t j = 0; j < classes_; ++j) {
    const double own = gram_row(j)[j];
    double norm = target[k] - 2 * target[j] + own;
    if (norm < kCancelled * (target[k] + own)) {
      norm = 0;
      for (std::int64_t d = 0; d < latents_; ++d) {
        const double difference = row(k)[d] - row(j)[d];
        norm += difference * difference;
      }
    }
    norms[j] = norm;
  }
  return norms;
}

}  // namespace tacext
