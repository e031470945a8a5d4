// The C interface: checks what C cannot, and lets no exception out.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tacext/build_info.h"
#include "tacext/guard.h"
#include "tacext/minimal_perturbation.h"
#include "tacext/pairwise_margin_max.h"
#include "tacext/tacext.h"

struct tacext_guard {
  std::unique_ptr<tacext::GuardFile> file;
};

namespace {

/// What a function of the interface was asked to do wrong.
struct Refused {
  tacext_status status;
  std::string message;
};

/// Runs body, and turns whatever it throws into a status and a message.
template <class Body>
tacext_status run(char* message, size_t message_size, const Body& body) {
  const auto tell = [&](const char* text) {
    if (message != nullptr && message_size > 0) std::snprintf(message, message_size, "%s", text);
  };
  tell("");
  try {
    body();
    return TACEXT_OK;
  } catch (const Refused& refused) {
    tell(refused.message.c_str());
    return refused.status;
  } catch (const std::bad_alloc&) {
    tell("tacext: memory: expected enough for this size, got none; use fewer rows at a time");
    return TACEXT_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    tell(error.what());
    return TACEXT_INVALID_ARGUMENT;
  }
}

void require(bool holds, const char* operation, const char* argument, const char* expected,
             const std::string& got, const char* way_out) {
  if (!holds)
    throw Refused{TACEXT_INVALID_ARGUMENT, std::string(operation) + ": " + argument +
                                               ": expected " + expected + ", got " + got + "; " +
                                               way_out};
}

void require_pointer(const void* pointer, const char* operation, const char* argument) {
  require(pointer != nullptr, operation, argument, "a pointer", "null", "pass an array");
}

void require_size(int64_t value, int64_t least, const char* operation, const char* argument) {
  require(value >= least, operation, argument, (std::to_string(least) + " or more").c_str(),
          std::to_string(value), "pass the size of the arrays");
}

void require_stride(int64_t stride, int64_t width, const char* operation, const char* argument) {
  require(stride >= width, operation, argument,
          ("elements from one row to the next, " + std::to_string(width) + " or more").c_str(),
          std::to_string(stride), "pass the width where rows follow one another");
}

[[noreturn]] void not_finite(const char* operation, const char* argument, int64_t row) {
  throw Refused{TACEXT_NOT_FINITE, std::string(operation) + ": " + argument +
                                       ": expected finite numbers, got NaN or infinity in row " +
                                       std::to_string(row) + "; reject that row"};
}

template <class T>
void require_finite(const T* values, int64_t rows, int64_t width, int64_t stride,
                    const char* operation, const char* argument) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j)
      if (!std::isfinite(values[i * stride + j])) not_finite(operation, argument, i);
}

void take(std::unique_ptr<tacext::GuardFile> file, const std::string& error, tacext_guard** guard) {
  if (!file) throw Refused{TACEXT_BAD_FILE, error};
  *guard = new tacext_guard{std::move(file)};
}

const tacext::GuardTable& table_of(const tacext_guard* guard) { return guard->file->table(); }

}  // namespace

const char* tacext_version(void) { return tacext::version(); }

tacext_status tacext_guard_load(const char* path, tacext_guard** guard, char* message,
                                size_t message_size) {
  return run(message, message_size, [&] {
    require_pointer(guard, "tacext_guard_load", "guard");
    *guard = nullptr;
    require_pointer(path, "tacext_guard_load", "path");
    std::string error;
    auto file = tacext::GuardFile::read(path, &error);
    take(std::move(file), error, guard);
  });
}

tacext_status tacext_guard_parse(const void* bytes, size_t size, tacext_guard** guard,
                                 char* message, size_t message_size) {
  return run(message, message_size, [&] {
    require_pointer(guard, "tacext_guard_parse", "guard");
    *guard = nullptr;
    require_pointer(bytes, "tacext_guard_parse", "bytes");
    std::string error;
    auto file = tacext::GuardFile::parse(bytes, size, &error);
    take(std::move(file), error, guard);
  });
}

void tacext_guard_free(tacext_guard* guard) { delete guard; }

int64_t tacext_guard_classes(const tacext_guard* guard) {
  return guard == nullptr ? -1 : table_of(guard).classes;
}
int64_t tacext_guard_latents(const tacext_guard* guard) {
  return guard == nullptr ? -1 : table_of(guard).latents;
}
int64_t tacext_guard_samples(const tacext_guard* guard) {
  return guard == nullptr ? -1 : table_of(guard).samples;
}
double tacext_guard_false_positive_rate(const tacext_guard* guard) {
  return guard == nullptr ? std::numeric_limits<double>::quiet_NaN()
                          : guard->file->false_positive_rate();
}
float tacext_guard_threshold(const tacext_guard* guard) {
  return guard == nullptr ? std::numeric_limits<float>::quiet_NaN() : table_of(guard).threshold;
}
const float* tacext_guard_head_norms(const tacext_guard* guard) {
  return guard == nullptr ? nullptr : guard->file->head_norms();
}

tacext_status tacext_guard_score(const tacext_guard* guard, const float* latent,
                                 int64_t latent_stride, const float* logits, int64_t logits_stride,
                                 int64_t count, float* score, float* p_value, uint8_t* flagged,
                                 char* message, size_t message_size) {
  const char* const operation = "tacext_guard_score";
  return run(message, message_size, [&] {
    require_pointer(guard, operation, "guard");
    require_pointer(latent, operation, "latent");
    require_pointer(logits, operation, "logits");
    require_size(count, 1, operation, "count");
    const tacext::GuardTable& table = table_of(guard);
    require_stride(latent_stride, table.latents, operation, "latent_stride");
    require_stride(logits_stride, table.classes, operation, "logits_stride");
    // In blocks, so that what the caller leaves out needs little room.
    constexpr int64_t kBlock = 256;
    float scores[kBlock], p_values[kBlock];
    bool flags[kBlock];
    int64_t first_bad = -1;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t rows = std::min(kBlock, count - begin);
      const tacext::GuardInput<float> input{latent + begin * latent_stride, latent_stride,
                                            logits + begin * logits_stride, logits_stride, rows};
      tacext::guard_score(table, input, {scores, p_values, flags}, tacext::serial_for);
      if (score != nullptr) std::copy_n(scores, rows, score + begin);
      if (p_value != nullptr) std::copy_n(p_values, rows, p_value + begin);
      if (flagged != nullptr) std::copy_n(flags, rows, flagged + begin);
      for (int64_t i = 0; i < rows && first_bad < 0; ++i)
        if (std::isinf(scores[i])) first_bad = begin + i;
    }
    if (first_bad >= 0) not_finite(operation, "latent, logits", first_bad);
  });
}

tacext_status tacext_pairwise_margin_max(const float* logits, int64_t logits_stride,
                                         int64_t samples, int64_t classes, float* margins,
                                         char* message, size_t message_size) {
  const char* const operation = "tacext_pairwise_margin_max";
  return run(message, message_size, [&] {
    require_pointer(logits, operation, "logits");
    require_pointer(margins, operation, "margins");
    require_size(samples, 1, operation, "samples");
    require_size(classes, 2, operation, "classes");
    require_stride(logits_stride, classes, operation, "logits_stride");
    require_finite(logits, samples, classes, logits_stride, operation, "logits");
    if (logits_stride == classes) {
      tacext::pairwise_margin_max(logits, samples, classes, margins, tacext::serial_for);
      return;
    }
    constexpr int64_t kRows = 1024;
    std::vector<float> packed(static_cast<std::size_t>(std::min(kRows, samples) * classes));
    for (int64_t begin = 0; begin < samples; begin += kRows) {
      const int64_t rows = std::min(kRows, samples - begin);
      for (int64_t i = 0; i < rows; ++i)
        std::copy_n(logits + (begin + i) * logits_stride, classes, packed.data() + i * classes);
      tacext::pairwise_margin_max(packed.data(), rows, classes, margins, tacext::serial_for);
    }
  });
}

tacext_status tacext_minimal_perturbation(const double* weight, const double* margins,
                                          const double* scale, int64_t classes, int64_t latents,
                                          double* perturbation, double* norm, int32_t* class_status,
                                          double* certificate, char* message, size_t message_size) {
  const char* const operation = "tacext_minimal_perturbation";
  return run(message, message_size, [&] {
    require_pointer(weight, operation, "weight");
    require_pointer(margins, operation, "margins");
    require_pointer(perturbation, operation, "perturbation");
    require_size(classes, 2, operation, "classes");
    require_size(latents, 1, operation, "latents");
    require_finite(weight, classes, latents, latents, operation, "weight");
    for (int64_t k = 0; k < classes; ++k)
      for (int64_t j = 0; j < classes; ++j)
        if (j != k && !std::isfinite(margins[k * classes + j])) not_finite(operation, "margins", k);
    for (int64_t d = 0; scale != nullptr && d < latents; ++d)
      if (!std::isfinite(scale[d]) || scale[d] <= 0)
        require(false, operation, "scale", "positive numbers", std::to_string(scale[d]),
                "pass null for all ones");
    const auto n = static_cast<std::size_t>(classes);
    std::vector<double> norms(n), multipliers(n * n), primal(n), dual(n), gap(n);
    std::vector<int32_t> status(n);
    std::vector<int64_t> iterations(n), active(n);
    const tacext::PerturbationProblem problem{weight,  margins, scale,  nullptr,
                                              classes, classes, latents};
    const tacext::PerturbationResult result{perturbation,  norms.data(),      multipliers.data(),
                                            status.data(), iterations.data(), active.data(),
                                            primal.data(), dual.data(),       gap.data()};
    tacext::minimal_perturbation(problem, {}, result, tacext::serial_for);
    if (norm != nullptr) std::copy(norms.begin(), norms.end(), norm);
    if (class_status != nullptr) std::copy(status.begin(), status.end(), class_status);
    for (std::size_t k = 0; certificate != nullptr && k < n; ++k)
      certificate[k] = status[k] == TACEXT_OPTIMAL ? std::max({primal[k], dual[k], gap[k]})
                                                   : std::numeric_limits<double>::quiet_NaN();
  });
}
