#pragma once

#include <gtest/gtest.h>

#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "tacext/guard.h"
#include "test_support.h"

// A guard of random numbers, as a table and as the file that would hold it.
namespace tacext::test {

/// What a guard says of some rows, and the memory behind it.
struct Answers {
  std::vector<float> score, p_value;
  std::unique_ptr<bool[]> flagged;

  explicit Answers(std::int64_t count)
      : score(count, -1), p_value(count, -1), flagged(new bool[count]()) {}
  GuardAnswer answer() { return {score.data(), p_value.data(), flagged.get()}; }
};

struct RandomGuard {
  std::int64_t classes, latents, ranks, knot_count;
  std::vector<float> mean, inverse_spread, basis, near_weight, far_weight, direction, location,
      inverse_deviation, knots, exceeding, head_norms;
  float threshold = 0;
  std::int64_t samples = 0;

  RandomGuard(std::int64_t c, std::int64_t d, std::int64_t r, std::int64_t k, unsigned seed = 1)
      : classes(c), latents(d), ranks(r), knot_count(k) {
    const auto floats = [&seed](std::int64_t count) {
      return as_elements<float>(normal_values(count, seed++));
    };
    mean = floats(c * d);
    inverse_spread = floats(d);
    for (float& value : inverse_spread) value = std::abs(value) + 0.1f;
    basis = floats(r * d);
    near_weight = floats(r + 1);
    far_weight = floats(r + 1);
    near_weight[0] = 2;
    far_weight[0] = 3;
    direction = floats(c * d);
    location = floats(c * 4);
    inverse_deviation = floats(c * 4);
    for (float& value : inverse_deviation) value = std::abs(value) / std::sqrt(float(d));
    knots = floats(k);
    for (float& value : knots) value = std::abs(value);
    std::sort(knots.begin(), knots.end());
    // Eight scores at every knot; the rate is that of the second knot from the top, or the only
    // one.
    samples = 8 * k;
    for (std::int64_t i = 0; i <= k; ++i) exceeding.push_back(float(8 * (k - i)));
    threshold = knots[std::max<std::int64_t>(0, k - 2)];
    rate = (1 + exceeding[std::max<std::int64_t>(1, k - 1)]) / (1.0 + double(samples));
    head_norms = floats(c);
  }

  double rate = 0;

  GuardTable table() const {
    return {classes,
            latents,
            ranks,
            knot_count,
            mean.data(),
            inverse_spread.data(),
            basis.data(),
            near_weight.data(),
            far_weight.data(),
            direction.data(),
            location.data(),
            inverse_deviation.data(),
            knots.data(),
            exceeding.data(),
            threshold,
            samples};
  }

  /// What its file is made of, for a test to change before it is joined. RATE and CRC stand for
  /// what fits the rest.
  struct Parts {
    std::string metadata =
        R"({"format":"tacext-guard","version":"1","false_positive_rate":"RATE","head":"f\"c",)"
        R"("ends_in_head":"true","created_with":"0.1.0","crc32":"CRC"})";
    std::string tensors;  ///< "name":{...},...
    std::string data;
  };

  /// CRC-32, bit by bit.
  static std::uint32_t checksum(const std::string& data) {
    std::uint32_t crc = ~0u;
    for (const char byte : data) {
      crc ^= static_cast<unsigned char>(byte);
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0u);
    }
    return ~crc;
  }

  Parts parts() const {
    Parts p;
    const auto add = [&p](const char* name, const char* dtype, const std::string& shape,
                          const void* values, std::size_t bytes) {
      const std::size_t begin = p.data.size();
      p.data.append(static_cast<const char*>(values), bytes);
      p.tensors += (p.tensors.empty() ? "" : ", ") + std::string("\"") + name +
                   "\": {\"dtype\":\"" + dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" +
                   std::to_string(begin) + "," + std::to_string(p.data.size()) + "]}";
    };
    const auto floats = [&](const char* name, const std::string& shape,
                            const std::vector<float>& values) {
      add(name, "F32", shape, values.data(), 4 * values.size());
    };
    const auto n = [](std::int64_t value) { return std::to_string(value); };
    std::vector<std::int64_t> counts(static_cast<std::size_t>(classes), 0);
    counts[0] = samples;
    const double norms[3] = {1, 2, 3};
    floats("mean", n(classes) + ", " + n(latents), mean);
    floats("inverse_spread", n(latents), inverse_spread);
    floats("basis", n(ranks) + "," + n(latents), basis);
    floats("near_weight", n(ranks + 1), near_weight);
    floats("far_weight", n(ranks + 1), far_weight);
    floats("direction", n(classes) + "," + n(latents), direction);
    floats("location", n(classes) + ",4", location);
    floats("inverse_deviation", n(classes) + ",4", inverse_deviation);
    floats("knots", n(knot_count), knots);
    floats("exceeding", n(knot_count + 1), exceeding);
    floats("head_norms", n(classes), head_norms);
    floats("threshold", "", {threshold});
    add("samples", "I64", "", &samples, 8);
    add("class_counts", "I64", n(classes), counts.data(), 8 * counts.size());
    add("model_norms", "F64", "3", norms, sizeof norms);
    char text[40];
    std::snprintf(text, sizeof text, "%.17g", rate);
    p.metadata.replace(p.metadata.find("RATE"), 4, text);
    return p;
  }

  static std::string join(Parts p) {
    const std::size_t at = p.metadata.find("CRC");
    if (at != std::string::npos) p.metadata.replace(at, 3, std::to_string(checksum(p.data)));
    const std::string header = "{\"__metadata__\":" + p.metadata + "," + p.tensors + "}  ";
    std::string bytes;
    for (int i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> 8 * i & 0xff);
    return bytes + header + p.data;
  }
};

/// The p-value and the flag of row i are those of its score.
inline void expect_rank_of_score(const RandomGuard& g, const Answers& found, std::int64_t i) {
  std::int64_t below = 0;
  for (const float knot : g.knots) below += knot < found.score[i];
  EXPECT_EQ(found.p_value[i], (1 + g.exceeding[below]) / (1 + float(g.samples)));
  EXPECT_EQ(found.flagged[i], found.score[i] > g.threshold);
}

/// Judges nine rows of a guard of 4 classes and 37 latents as they are, and with most of them
/// spoiled.
template <class Judge>
void expect_not_finite_rows_are_flagged(const RandomGuard& g, const Judge& judge) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const std::int64_t count = 9;
  auto x = as_elements<float>(normal_values(count * 37, 5));
  auto z = as_elements<float>(normal_values(count * 4, 6));
  Answers expected(count), found(count);
  judge(x, z, expected);
  x[1 * 37 + 36] = nan;
  x[2 * 37] = -infinity;
  z[3 * 4 + 2] = nan;
  z[4 * 4] = infinity;
  z[5 * 4 + 3] = -infinity;
  x[6 * 37 + 5] = 1e30f;  // finite, but its square is not
  for (int j = 0; j < 4; ++j) z[7 * 4 + j] = nan;
  z[8 * 4] = 3e38f;  // finite, but the difference is not
  z[8 * 4 + 1] = z[8 * 4 + 2] = z[8 * 4 + 3] = -3e38f;
  judge(x, z, found);
  for (std::int64_t i = 0; i < count; ++i) {
    const bool bad = i >= 1;
    EXPECT_EQ(found.score[i], bad ? infinity : expected.score[i]) << "row " << i;
    EXPECT_EQ(found.flagged[i], bad || expected.flagged[i]);
    if (bad) {
      EXPECT_EQ(found.p_value[i], 1 / (1 + float(g.samples)));
    }
  }
}

}  // namespace tacext::test
