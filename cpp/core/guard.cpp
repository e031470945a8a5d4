#include "tacext/guard.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "simd.h"

namespace tacext {
namespace {

constexpr int kLanes = 16;
// Products are made of so many rows with so many samples at a time: what is read of the rows serves
// several samples, and the sums need not wait for one another.
constexpr int kRows = 4, kSamples = 4;

// One register at the widest level, several at others; loads need not be aligned.
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// Sixteen running sums, folded in a fixed tree: the same bits at every vector width.
TACEXT_INLINE float fold(const Lanes& sums) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight eight[2];
  std::memcpy(eight, &sums, sizeof sums);
  const Eight pairs = eight[0] + eight[1];
  Four four[2];
  std::memcpy(four, &pairs, sizeof pairs);
  const Four quads = four[0] + four[1];
  return (quads[0] + quads[2]) + (quads[1] + quads[3]);
}

// out[s * kTileRows + r] = rows[r] . samples[s], of `count` values each.
template <int kTileRows, int kTileSamples>
TACEXT_INLINE void dot_tile(const float* const* rows, const float* const* samples,
                            std::int64_t count, float* out) {
  Lanes sums[kTileSamples][kTileRows] = {};
  std::int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) {
    Lanes row[kTileRows];
    for (int r = 0; r < kTileRows; ++r) row[r] = *reinterpret_cast<const Lanes*>(rows[r] + d);
    for (int s = 0; s < kTileSamples; ++s) {
      const Lanes sample = *reinterpret_cast<const Lanes*>(samples[s] + d);
      for (int r = 0; r < kTileRows; ++r) sums[s][r] += row[r] * sample;
    }
  }
  for (int lane = 0; d < count; ++d, ++lane)
    for (int s = 0; s < kTileSamples; ++s)
      for (int r = 0; r < kTileRows; ++r) sums[s][r][lane] += rows[r][d] * samples[s][d];
  for (int s = 0; s < kTileSamples; ++s)
    for (int r = 0; r < kTileRows; ++r) out[s * kTileRows + r] = fold(sums[s][r]);
}

struct Logits {
  std::int64_t predicted;
  float margin;
  bool finite;
};

template <class T>
TACEXT_INLINE Logits read_logits(const T* logits, std::int64_t classes) {
  Logits found{0, 0, true};
  float best = -std::numeric_limits<float>::infinity(), next = best;
  for (std::int64_t k = 0; k < classes; ++k) {
    const float z = static_cast<float>(to_float(logits[k]));
    found.finite = found.finite && std::isfinite(z);
    if (z > best) {  // the first of equals, as argmax takes
      next = best;
      best = z;
      found.predicted = k;
    } else if (z > next) {
      next = z;
    }
  }
  found.margin = best - next;
  return found;
}

TACEXT_INLINE float root(float square) { return square > 0 ? std::sqrt(square) : 0.0f; }

// What is known of a sample before its products with the basis.
struct Sample {
  Logits logits;
  float square, aligned, near, far;
};

template <class T>
TACEXT_INLINE Sample begin_sample(const GuardTable& t, const T* latent, const T* logits, float* y) {
  Sample sample;
  sample.logits = read_logits(logits, t.classes);
  const std::int64_t k = sample.logits.predicted;
  const float* mean = t.mean + k * t.latents;
  for (std::int64_t d = 0; d < t.latents; ++d)
    y[d] = (static_cast<float>(to_float(latent[d])) - mean[d]) * t.inverse_spread[d];
  const float* const rows[2] = {y, t.direction + k * t.latents};
  float products[2];
  dot_tile<2, 1>(rows, &rows[0], t.latents, products);
  sample.square = products[0];
  sample.aligned = products[1];
  sample.near = sample.square * t.near_weight[0];
  sample.far = sample.square * t.far_weight[0];
  return sample;
}

TACEXT_INLINE float end_sample(const GuardTable& t, const Sample& sample) {
  // Of a latent that is not finite |y|^2 is not.
  const bool finite = sample.logits.finite && std::isfinite(sample.square);
  const float parts[4] = {root(sample.near), root(sample.far), sample.aligned,
                          sample.logits.margin};
  const float* location = t.location + sample.logits.predicted * 4;
  const float* inverse = t.inverse_deviation + sample.logits.predicted * 4;
  float total = 0;
  for (int i = 0; i < 4; ++i) {
    const float excess = (parts[i] - location[i]) * inverse[i];
    if (excess > 0) total += excess * excess;
  }
  const float score = std::sqrt(total);
  return finite && std::isfinite(score) ? score : std::numeric_limits<float>::infinity();
}

// Scores of kSamples rows or fewer; y has room for kSamples latents.
template <class T>
TACEXT_INLINE void score_block(const GuardTable& t, const GuardInput<T>& input, std::int64_t begin,
                               std::int64_t count, float* y, float* scores) {
  Sample samples[kSamples];
  const float* latents[kSamples];
  for (std::int64_t s = 0; s < kSamples; ++s) {
    const std::int64_t own = s < count ? s : 0;  // the place of a missing one is taken by the first
    latents[s] = y + own * t.latents;
    if (s < count)
      samples[s] =
          begin_sample(t, input.latent + (begin + s) * input.latent_stride,
                       input.logits + (begin + s) * input.logits_stride, y + s * t.latents);
  }
  for (std::int64_t first = 0; first < t.ranks; first += kRows) {
    const std::int64_t used = std::min<std::int64_t>(kRows, t.ranks - first);
    const float* rows[kRows];
    for (std::int64_t r = 0; r < kRows; ++r)
      rows[r] = t.basis + (first + std::min(r, used - 1)) * t.latents;
    float products[kSamples * kRows];
    if (count == 1)
      dot_tile<kRows, 1>(rows, latents, t.latents, products);
    else
      dot_tile<kRows, kSamples>(rows, latents, t.latents, products);
    for (std::int64_t s = 0; s < count; ++s)
      for (std::int64_t r = 0; r < used; ++r) {
        const float along = products[s * kRows + r] * products[s * kRows + r];
        samples[s].near += along * t.near_weight[1 + first + r];
        samples[s].far += along * t.far_weight[1 + first + r];
      }
  }
  for (std::int64_t s = 0; s < count; ++s) scores[s] = end_sample(t, samples[s]);
}

#define TACEXT_SCORE_RANGE(T)                                                                     \
  TACEXT_SIMD_CLONES void score_range(const GuardTable& t, const GuardInput<T>& input,            \
                                      std::int64_t begin, std::int64_t end, float* y, float* s) { \
    for (std::int64_t i = begin; i < end; i += kSamples)                                          \
      score_block(t, input, i, std::min<std::int64_t>(kSamples, end - i), y, s + i);              \
  }
TACEXT_SCORE_RANGE(float)
TACEXT_SCORE_RANGE(double)
TACEXT_SCORE_RANGE(Half)
TACEXT_SCORE_RANGE(BFloat16)
#undef TACEXT_SCORE_RANGE

}  // namespace

template <class T>
void guard_score(const GuardTable& table, const GuardInput<T>& input, const GuardAnswer& answer,
                 const ParallelFor& parallel_for) {
  const std::int64_t work = std::max<std::int64_t>(1, table.latents * (table.ranks + 4));
  parallel_for(input.count, std::max<std::int64_t>(1, 262144 / work),
               [&](std::int64_t begin, std::int64_t end) {
                 std::vector<float> y(static_cast<std::size_t>(kSamples * table.latents));
                 score_range(table, input, begin, end, y.data(), answer.score);
                 const float *first = table.knots, *last = first + table.knot_count;
                 for (std::int64_t i = begin; i < end; ++i) {
                   const float score = answer.score[i];
                   const std::int64_t below = std::lower_bound(first, last, score) - first;
                   answer.p_value[i] =
                       (1 + table.exceeding[below]) / static_cast<float>(1 + table.samples);
                   answer.flagged[i] = score > table.threshold;
                 }
               });
}

#define TACEXT_GUARD_SCORE(T)                                                            \
  template void guard_score(const GuardTable&, const GuardInput<T>&, const GuardAnswer&, \
                            const ParallelFor&);
TACEXT_GUARD_SCORE(float)
TACEXT_GUARD_SCORE(double)
TACEXT_GUARD_SCORE(Half)
TACEXT_GUARD_SCORE(BFloat16)
#undef TACEXT_GUARD_SCORE

}  // namespace tacext
