// The norms of the minimal perturbations of a head, in C++ and without torch:
//
//   scan_head CLASSES LATENTS WEIGHT LOGITS
//
// WEIGHT [classes, latents] and LOGITS [samples, classes] of clean samples are raw float32 files.
// Prints for every class the norm and the certificate, the smallest norm first: where it is much
// smaller than the others, look at that class.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <numeric>
#include <vector>

#include "tacext/minimal_perturbation.h"
#include "tacext/pairwise_margin_max.h"
#include "tacext/parallel.h"

static std::vector<float> read_floats(const char* path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return {};
  std::vector<float> values(static_cast<std::size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(float)));
  return values;
}

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: scan_head CLASSES LATENTS WEIGHT LOGITS\n");
    return 4;
  }
  const std::int64_t classes = std::atoll(argv[1]), latents = std::atoll(argv[2]);
  const std::vector<float> weight = read_floats(argv[3]), logits = read_floats(argv[4]);
  if (classes < 2 || latents < 1 || weight.size() != static_cast<std::size_t>(classes * latents) ||
      logits.empty() || logits.size() % static_cast<std::size_t>(classes) != 0) {
    std::fprintf(stderr, "error: the files are not of these sizes\n");
    return 2;
  }
  const auto n = static_cast<std::size_t>(classes);
  std::vector<float> margins(n * n, -std::numeric_limits<float>::infinity());
  const std::int64_t samples = static_cast<std::int64_t>(logits.size()) / classes;
  tacext::pairwise_margin_max(logits.data(), samples, classes, margins.data(), tacext::serial_for);

  const std::vector<double> w(weight.begin(), weight.end()), m(margins.begin(), margins.end());
  std::vector<double> s(w.size()), norm(n), multipliers(n * n), primal(n), dual(n), gap(n);
  std::vector<std::int32_t> status(n);
  std::vector<std::int64_t> iterations(n), active(n);
  tacext::minimal_perturbation(
      {w.data(), m.data(), nullptr, nullptr, classes, classes, latents}, {},
      {s.data(), norm.data(), multipliers.data(), status.data(), iterations.data(), active.data(),
       primal.data(), dual.data(), gap.data()},
      tacext::serial_for);

  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return norm[a] < norm[b]; });
  for (const std::size_t k : order)
    std::printf("%zu %.17g %.2g\n", k, norm[k], std::max({primal[k], dual[k], gap[k]}));
  return 0;
}
