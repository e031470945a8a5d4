#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "simd.h"
#include "tacext/half.h"
#include "tacext/minimal_perturbation.h"
#include "tacext/parallel.h"

// Inputs and plain references that several tests share.
namespace tacext::test {

using Values = std::vector<double>;

inline Values normal_values(std::int64_t count, unsigned seed, double deviation = 1.0) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0.0, deviation);
  Values values(static_cast<std::size_t>(count));
  for (double& value : values) value = normal(engine);
  return values;
}

/// Values of an element type. For the 16-bit types the value is cut, not rounded: references
/// convert back with to_float, so that any value will do.
template <class T>
std::vector<T> as_elements(const Values& values) {
  std::vector<T> elements;
  for (double value : values) {
    const float single = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    if constexpr (std::is_same_v<T, BFloat16>) {
      elements.push_back({static_cast<std::uint16_t>(bits >> 16)});
    } else if constexpr (std::is_same_v<T, Half>) {  // for 2^-14 <= |value| < 2^16, else zero
      const int exponent = static_cast<int>(bits >> 23 & 0xff) - 112;
      const std::uint32_t magnitude =
          exponent > 0 && exponent < 31
              ? static_cast<std::uint32_t>(exponent) << 10 | (bits >> 13 & 0x3ff)
              : 0;
      elements.push_back({static_cast<std::uint16_t>((bits >> 16 & 0x8000) | magnitude)});
    } else {
      elements.push_back(static_cast<T>(value));
    }
  }
  return elements;
}

/// A ParallelFor on threads of its own that cuts ranges oddly, whatever the grain.
inline void odd_threads(std::int64_t count, std::int64_t /*grain*/, const RangeBody& body) {
  std::vector<std::thread> threads;
  std::int64_t length = 1;
  for (std::int64_t begin = 0; begin < count; begin += length, length = length % 7 + 2) {
    const std::int64_t end = std::min(count, begin + length);
    threads.emplace_back([&body, begin, end] { body(begin, end); });
    if (threads.size() == 3) {
      for (std::thread& thread : threads) thread.join();
      threads.clear();
    }
  }
  for (std::thread& thread : threads) thread.join();
}

/// W and M of a head; margins are those of `samples` random latents.
struct TestHead {
  std::int64_t classes, latents;
  Values weight, margins;

  double margin(std::int64_t k, std::int64_t j) const { return margins[k * classes + j]; }
  /// a_j[d] = w_k[d] - w_j[d]
  double constraint(std::int64_t k, std::int64_t j, std::int64_t d) const {
    return weight[k * latents + d] - weight[j * latents + d];
  }
};

/// Eight rows huge and alike beside two small ones, of which only (0.3, -0.1) . s >= 1 binds class
/// 9: |s_9| = sqrt(10).
inline TestHead huge_and_small_rows(double huge) {
  TestHead head{10, 2, Values(20, 0.0), Values(100, -1.0)};
  for (std::int64_t j = 0; j < 8; ++j) {
    head.weight[j * 2] = huge;
    head.weight[j * 2 + 1] = static_cast<double>(j) / 3;
    head.margins[9 * 10 + j] = -100 * huge;
  }
  const Values small{0.1, 0.3, 0.4, 0.2};
  std::copy(small.begin(), small.end(), head.weight.begin() + 16);
  head.margins[9 * 10 + 8] = 1;
  return head;
}

/// Three rows of 2048 like entries. w_0 - w_1 is tiny beside both; the third row keeps them from
/// being centred, and makes an s with which products of w_0 and of w_1 drift apart by rounding.
inline TestHead drifting_head() {
  constexpr std::int64_t kLatents = 2048, kHalf = kLatents / 2;
  constexpr double kApart = 2.5102242920886285e-09, kStep = 1.2717851313028796;
  TestHead head{3, kLatents, Values(3 * kLatents, 1.0), Values(9, 0.0)};
  for (std::int64_t d = 0; d < kLatents; ++d) {
    head.weight[kLatents + d] = 1 + (d < kHalf ? 1.5 : 0.5) * kApart;
    head.weight[2 * kLatents + d] = -1;
  }
  const long double product =
      kHalf * (static_cast<long double>(head.constraint(0, 1, 0)) + head.constraint(0, 1, kHalf));
  head.margins[1] = static_cast<double>(kStep * product * (1 - 8.397587411939426e-07L));
  head.margins[2] = 2 * kLatents * kStep;
  return head;
}

/// M of weight and random latents and biases: what pairwise_margin_max gives, in plain loops.
inline Values random_margins(const Values& weight, std::int64_t classes, std::int64_t latents,
                             std::int64_t samples, unsigned seed) {
  const Values latent = normal_values(samples * latents, seed);
  const Values bias = normal_values(classes, seed + 1, 0.1);
  Values margins(static_cast<std::size_t>(classes * classes), -HUGE_VAL);
  for (std::int64_t i = 0; i < samples; ++i) {
    Values logits = bias;
    for (std::int64_t k = 0; k < classes; ++k)
      for (std::int64_t d = 0; d < latents; ++d)
        logits[k] += weight[k * latents + d] * latent[i * latents + d];
    for (std::int64_t k = 0; k < classes; ++k)
      for (std::int64_t j = 0; j < classes; ++j)
        margins[k * classes + j] = std::max(margins[k * classes + j], logits[j] - logits[k]);
  }
  return margins;
}

inline TestHead random_head(std::int64_t classes, std::int64_t latents, std::int64_t samples,
                            unsigned seed) {
  TestHead head{classes, latents, normal_values(classes * latents, seed), {}};
  head.margins = random_margins(head.weight, classes, latents, samples, seed + 100);
  return head;
}

/// A result and the memory behind it, full of what no field may be left as.
struct TestSolution {
  std::int64_t count, classes, latents;
  Values perturbation, norm, multipliers, primal, dual, gap;
  std::vector<std::int32_t> status;
  std::vector<std::int64_t> iterations, active;

  TestSolution(std::int64_t count_, std::int64_t classes_, std::int64_t latents_)
      : count(count_),
        classes(classes_),
        latents(latents_),
        perturbation(static_cast<std::size_t>(count * latents), kUnwritten),
        norm(static_cast<std::size_t>(count), kUnwritten),
        multipliers(static_cast<std::size_t>(count * classes), kUnwritten),
        primal(norm),
        dual(norm),
        gap(norm),
        status(norm.size(), -1),
        iterations(norm.size(), -1),
        active(norm.size(), -1) {}

  static constexpr double kUnwritten = -7.25;
  /// Whether every field of every class was written.
  bool is_complete() const {
    const auto left = [](const auto& values, auto unwritten) {
      return std::count(values.begin(), values.end(), unwritten) > 0;
    };
    return !left(perturbation, kUnwritten) && !left(norm, kUnwritten) &&
           !left(multipliers, kUnwritten) && !left(primal, kUnwritten) && !left(dual, kUnwritten) &&
           !left(gap, kUnwritten) && !left(status, -1) && !left(iterations, -1) &&
           !left(active, -1);
  }

  PerturbationResult pointers() {
    return {perturbation.data(), norm.data(),       multipliers.data(),
            status.data(),       iterations.data(), active.data(),
            primal.data(),       dual.data(),       gap.data()};
  }
  const double* s(std::int64_t row) const { return perturbation.data() + row * latents; }
  const double* l(std::int64_t row) const { return multipliers.data() + row * classes; }
  bool is(std::int64_t row, Status wanted) const {
    return status[row] == static_cast<std::int32_t>(wanted);
  }
};

inline TestSolution solve(const TestHead& head, const SolverSettings& settings = {},
                          const double* scale = nullptr,
                          const std::vector<std::int64_t>* targets = nullptr,
                          const ParallelFor& parallel_for = serial_for) {
  const std::int64_t count = targets ? static_cast<std::int64_t>(targets->size()) : head.classes;
  TestSolution solution(count, head.classes, head.latents);
  minimal_perturbation({head.weight.data(), head.margins.data(), scale,
                        targets ? targets->data() : nullptr, count, head.classes, head.latents},
                       settings, solution.pointers(), parallel_for);
  EXPECT_TRUE(solution.is_complete());
  return solution;
}

// No s satisfies the constraints if sum_j l_j a_j = 0 although m.l > 0.
inline void expect_unreachable(const TestHead& head, const TestSolution& solution, std::int64_t row,
                               std::int64_t k) {
  EXPECT_EQ(solution.norm[row], HUGE_VAL);
  EXPECT_TRUE(std::isnan(solution.s(row)[0]));
  const double* const l = solution.l(row);
  double sum = 0, value = 0;
  for (std::int64_t j = 0; j < head.classes; ++j) {
    EXPECT_GE(l[j], 0);
    sum += l[j];
    value += j == k ? 0 : l[j] * head.margin(k, j);
  }
  EXPECT_NEAR(sum, 1, 1e-12);
  EXPECT_GT(value, 0);
  EXPECT_NEAR(solution.gap[row], -value, 1e-9 * value);
  for (std::int64_t d = 0; d < head.latents; ++d) {
    double total = 0, size = 0;
    for (std::int64_t j = 0; j < head.classes; ++j) {
      total += l[j] * head.constraint(k, j, d);
      size += l[j] * std::fabs(head.constraint(k, j, d));
    }
    EXPECT_LE(std::fabs(total), 1e-11 * (1 + size));
  }
}

/// The largest violation of class k by its stored s, and the norm, in extended precision.
struct Wide {
  long double violation = 0, relative = 0, norm = 0;
};
inline Wide violation_of(const TestHead& head, const TestSolution& solution, std::int64_t k) {
  Wide wide;
  for (std::int64_t d = 0; d < head.latents; ++d)
    wide.norm += static_cast<long double>(solution.s(k)[d]) * solution.s(k)[d];
  wide.norm = std::sqrt(wide.norm);
  for (std::int64_t j = 0; j < head.classes; ++j) {
    if (j == k) continue;
    long double left = head.margin(k, j), length = 0;
    for (std::int64_t d = 0; d < head.latents; ++d) {
      const long double a = static_cast<long double>(head.weight[k * head.latents + d]) -
                            head.weight[j * head.latents + d];
      left -= a * solution.s(k)[d];
      length += a * a;
    }
    const long double size = std::fabs(head.margin(k, j)) + std::sqrt(length) * wide.norm;
    wide.violation = std::max(wide.violation, left);
    if (left > 0) wide.relative = std::max(wide.relative, left / size);
  }
  return wide;
}

/// The heads on which every version of the solver is tried.
struct NamedHead {
  const char* name;
  TestHead head;
};

inline std::vector<NamedHead> various_heads() {
  std::vector<NamedHead> heads;
  heads.push_back({"random", random_head(12, 20, 40, 1)});
  heads.push_back({"more classes than latents", random_head(40, 8, 60, 2)});
  heads.push_back({"two classes", random_head(2, 5, 10, 3)});

  TestHead centred = random_head(10, 16, 30, 4);  // rows that sum to zero
  for (std::int64_t d = 0; d < 16; ++d) {
    double mean = 0;
    for (std::int64_t j = 0; j < 10; ++j) mean += centred.weight[j * 16 + d] / 10;
    for (std::int64_t j = 0; j < 10; ++j) centred.weight[j * 16 + d] -= mean;
  }
  centred.margins = random_margins(centred.weight, 10, 16, 30, 5);
  heads.push_back({"centred", centred});

  TestHead common = centred;  // a common component that dwarfs the differences
  for (double& w : common.weight) w += 1e8;
  heads.push_back({"common component", common});

  TestHead deficient{15, 24, Values(15 * 24, 0.0), {}};  // rank 4
  const Values left = normal_values(15 * 4, 6), right = normal_values(4 * 24, 7);
  for (std::int64_t j = 0; j < 15; ++j)
    for (std::int64_t d = 0; d < 24; ++d)
      for (std::int64_t r = 0; r < 4; ++r)
        deficient.weight[j * 24 + d] += left[j * 4 + r] * right[r * 24 + d];
  deficient.margins = random_margins(deficient.weight, 15, 24, 30, 8);
  heads.push_back({"rank-deficient", deficient});

  TestHead twins = random_head(9, 14, 30, 9);  // two equal rows: neither can beat the other
  std::copy_n(twins.weight.begin() + 2 * 14, 14, twins.weight.begin() + 6 * 14);
  twins.margins = random_margins(twins.weight, 9, 14, 30, 10);
  heads.push_back({"duplicated row", twins});

  TestHead close = random_head(8, 14, 30, 13);  // rows so close that K hardly tells them apart
  const Values apart = normal_values(2 * 14, 14, 1e-4);
  for (std::int64_t d = 0; d < 14; ++d) {
    close.weight[3 * 14 + d] = close.weight[2 * 14 + d] + apart[d];
    close.weight[6 * 14 + d] = close.weight[2 * 14 + d] + apart[14 + d];
  }
  close.margins = random_margins(close.weight, 8, 14, 30, 15);
  heads.push_back({"nearly equal rows", close});

  TestHead scaled = random_head(14, 18, 40, 11);  // rows of very different length
  for (std::int64_t j = 0; j < 14; ++j)
    for (std::int64_t d = 0; d < 18; ++d)
      scaled.weight[j * 18 + d] *= std::pow(10.0, static_cast<double>(j % 5) - 2);
  scaled.margins = random_margins(scaled.weight, 14, 18, 40, 12);
  heads.push_back({"badly scaled", scaled});
  return heads;
}

/// Runs body with the kernels of every vector width that is compiled for, as far as this machine
/// has them. Functions that the loader picks (TACEXT_SIMD_CLONES) stay those of this machine.
template <class Body>
void with_each_simd_width(const Body& body) {
  for (const int width : {16, 32, 64}) {
    SCOPED_TRACE("vectors of " + std::to_string(width) + " bytes");
    simd_width_limit = width;
    body();
  }
}

}  // namespace tacext::test
