/* The C interface of tacext: margins, minimal perturbations and guards, for any language.
 *
 * Plain pointers, sizes and strides; no torch, no Python, and no exception leaves a function. All
 * matrices are row-major; a stride counts elements from one row to the next. Every function may be
 * called by any number of threads at a time, and works on the thread that calls it.
 *
 * Functions return a status. Where it is not TACEXT_OK, `message` (of `message_size` bytes, or
 * null) holds one line: operation: argument: expected ..., got ...; way out.
 */
#ifndef TACEXT_TACEXT_H
#define TACEXT_TACEXT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define TACEXT_C_API __attribute__((visibility("default")))
#else
#define TACEXT_C_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  TACEXT_OK = 0,
  TACEXT_INVALID_ARGUMENT = 1, /* a null pointer, a size or a stride out of range */
  TACEXT_BAD_FILE = 2,         /* missing, truncated, damaged, or not of a guard */
  TACEXT_NOT_FINITE = 3,       /* NaN or infinity among the inputs */
  TACEXT_OUT_OF_MEMORY = 4
} tacext_status;

/* The version of the library, as "0.1.0". */
TACEXT_C_API const char* tacext_version(void);

/* ---- guard: is this input a trigger? ------------------------------------------------------------
 */

typedef struct tacext_guard tacext_guard;

/* Reads a guard that tacext.Guard.save wrote, from a file or from its bytes. On success *guard is
 * to be freed with tacext_guard_free; otherwise it is null. */
TACEXT_C_API tacext_status tacext_guard_load(const char* path, tacext_guard** guard, char* message,
                                             size_t message_size);
TACEXT_C_API tacext_status tacext_guard_parse(const void* bytes, size_t size, tacext_guard** guard,
                                              char* message, size_t message_size);
TACEXT_C_API void tacext_guard_free(tacext_guard* guard);

/* Of a null guard -1, NaN or null. */
TACEXT_C_API int64_t tacext_guard_classes(const tacext_guard* guard);
TACEXT_C_API int64_t tacext_guard_latents(const tacext_guard* guard);
/* Clean samples behind its p-values. */
TACEXT_C_API int64_t tacext_guard_samples(const tacext_guard* guard);
TACEXT_C_API double tacext_guard_false_positive_rate(const tacext_guard* guard);
/* The score above which an input is flagged. */
TACEXT_C_API float tacext_guard_threshold(const tacext_guard* guard);
/* [classes], the lengths of the rows of the last layer that the guard was fitted on: compare them
 * with those of your model. They live as long as the guard. */
TACEXT_C_API const float* tacext_guard_head_norms(const tacext_guard* guard);

/* Judges `count` >= 1 rows of latents (what flows into the model's last layer) and of its logits.
 *
 * score, p_value and flagged (0 or 1) get `count` values each; any of them may be null. A row with
 * NaN or infinity gets an infinite score and is flagged, all others are judged as ever, and the
 * status is TACEXT_NOT_FINITE with the first such row in the message. */
TACEXT_C_API tacext_status tacext_guard_score(const tacext_guard* guard, const float* latent,
                                              int64_t latent_stride, const float* logits,
                                              int64_t logits_stride, int64_t count, float* score,
                                              float* p_value, uint8_t* flagged, char* message,
                                              size_t message_size);

/* ---- margins and minimal perturbations
 * ----------------------------------------------------------- */

/* margins[k, j] = max(margins[k, j], max_i (logits[i, j] - logits[i, k])) over `samples` rows.
 *
 * Begin with all margins at -infinity; batches may follow one another. */
TACEXT_C_API tacext_status tacext_pairwise_margin_max(const float* logits, int64_t logits_stride,
                                                      int64_t samples, int64_t classes,
                                                      float* margins, char* message,
                                                      size_t message_size);

typedef enum {
  TACEXT_OPTIMAL = 0,
  TACEXT_UNREACHABLE = 1,
  TACEXT_ITERATION_LIMIT = 2
} tacext_class_status;

/* s_k = argmin 1/2 |s / scale|^2  s.t.  (w_k - w_j).s >= margins[k, j] for all j != k, for every k.
 *
 * weight is [classes, latents], margins [classes, classes] (its diagonal is not read), scale
 * [latents] and positive, or null for all ones. perturbation [classes, latents], norm [classes]
 * (|s_k / scale|), class_status [classes] (of tacext_class_status) and certificate [classes] (the
 * largest KKT residual of an optimal s_k, NaN of others) are filled; any but the first may be null.
 */
TACEXT_C_API tacext_status tacext_minimal_perturbation(const double* weight, const double* margins,
                                                       const double* scale, int64_t classes,
                                                       int64_t latents, double* perturbation,
                                                       double* norm, int32_t* class_status,
                                                       double* certificate, char* message,
                                                       size_t message_size);

#ifdef __cplusplus
}
#endif
#endif
