#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "tacext/export.h"
#include "tacext/half.h"
#include "tacext/parallel.h"

namespace tacext {

/// What a guard knows of clean latents; all arrays row-major float32, owned by someone else.
///
/// With y = (phi - mean[k]) * inverse_spread for the predicted class k, squares = |y|^2, (basis
/// y)^2:
///   near    = sqrt(near_weight . squares)        far = sqrt(far_weight . squares)
///   aligned = direction[k] . y                   margin = logits[k] - the next largest
///   score   = | max(0, (part - location[k]) * inverse_deviation[k]) | over these four parts
///   p_value = (1 + exceeding[number of knots below score]) / (1 + samples)
struct GuardTable {
  std::int64_t classes, latents, ranks, knot_count;
  const float* mean;               ///< [classes, latents]
  const float* inverse_spread;     ///< [latents]
  const float* basis;              ///< [ranks, latents]
  const float* near_weight;        ///< [1 + ranks]
  const float* far_weight;         ///< [1 + ranks]
  const float* direction;          ///< [classes, latents]
  const float* location;           ///< [classes, 4]
  const float* inverse_deviation;  ///< [classes, 4]
  const float* knots;              ///< [knot_count], rising
  const float* exceeding;          ///< [knot_count + 1]
  float threshold;
  std::int64_t samples;
};

/// Rows of latents [count, latents] and logits [count, classes]; the strides count elements from
/// one row to the next.
template <class T>
struct GuardInput {
  const T* latent;
  std::int64_t latent_stride;
  const T* logits;
  std::int64_t logits_stride;
  std::int64_t count;
};

/// Where the answers go, [count] each.
struct GuardAnswer {
  float* score;    ///< infinite where a latent or a logit is not finite
  float* p_value;  ///< share of clean inputs with such a score or a higher one, never understated
  bool* flagged;   ///< score > threshold
};

/// Judges every row, in float32: the same bits for any number of threads, rows or SIMD level.
/// Sizes, strides and pointers are for the caller to check, as C++ allows; tacext.h checks them. No
/// row is no error. A row that is not finite gets an infinite score, and the others are judged as
/// ever. Everything is shared read-only: any number of callers may use one table at a time. T:
/// float, double, Half or BFloat16.
template <class T>
TACEXT_API void guard_score(const GuardTable& table, const GuardInput<T>& input,
                            const GuardAnswer& answer, const ParallelFor& parallel_for);

/// A guard read from the file that tacext.Guard.save writes; owns the arrays of its table.
class TACEXT_API GuardFile {
 public:
  /// Reads a file, or the bytes of one. Null where it is missing, truncated, damaged or none of a
  /// guard; then *error says why. Throws nothing but std::bad_alloc.
  static std::unique_ptr<GuardFile> read(const char* path, std::string* error);
  static std::unique_ptr<GuardFile> parse(const void* bytes, std::size_t size, std::string* error);

  ~GuardFile();
  GuardFile(const GuardFile&) = delete;
  GuardFile& operator=(const GuardFile&) = delete;

  const GuardTable& table() const;
  double false_positive_rate() const;
  /// [classes], the lengths of the rows of the head that the guard was fitted on.
  const float* head_norms() const;

 private:
  struct Content;
  static std::unique_ptr<GuardFile> parse_as(const char* argument, const void* bytes,
                                             std::size_t size, std::string* error);
  explicit GuardFile(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tacext
