#pragma once

#include <stdbool.h>
#include <stdint.h>

/* The CUDA kernels of tacext behind plain C: raw device pointers and sizes, no torch, no Python.
 *
 * Every launch is asynchronous on `stream`, a cudaStream_t of the current device, and returns a
 * cudaError_t as int. Matrices are row-major and contiguous. */
#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  TACEXT_CUDA_FLOAT32,
  TACEXT_CUDA_FLOAT64,
  TACEXT_CUDA_FLOAT16,
  TACEXT_CUDA_BFLOAT16
} tacext_cuda_type;

/* Devices at hand; 0 without a driver. */
int tacext_cuda_device_count(void);
const char* tacext_cuda_error_string(int error);

/* margins[k, j] = max(margins[k, j], max_i (logits[i, j] - logits[i, k])).
 * logits is [samples, classes]; margins is [classes, classes], float64 for float64 logits and
 * float32 for the rest. A NaN logit turns its row and column of margins into NaN. */
int tacext_cuda_pairwise_margin_max(const void* logits, tacext_cuda_type type, int64_t samples,
                                    int64_t classes, void* margins, void* stream);

/* scores[c] = 1/samples sum_i sum_p activation[i, c, p] * gradient[i, c, p], summed in double in an
 * order fixed by the sizes alone. workspace: as many doubles as .._workspace says. */
int64_t tacext_cuda_neuron_scores_workspace(int64_t samples, int64_t channels, int64_t positions);
int tacext_cuda_neuron_scores(const void* activation, const void* gradient, tacext_cuda_type type,
                              int64_t samples, int64_t channels, int64_t positions, double* scores,
                              double* workspace, void* stream);

/* *first = the smallest index of a NaN or an infinity among `count` values, or -1. */
int tacext_cuda_first_non_finite(const double* values, int64_t count, int64_t* first, void* stream);

/* The fields of tacext::PerturbationProblem, of its settings, and of tacext::PerturbationResult,
 * with the same shapes and meaning; all pointers on the device. max_iterations is at least 1. */
typedef struct {
  const double* weight;
  const double* margins;
  const double* scale;
  const int64_t* targets;
  int64_t count;
  int64_t classes;
  int64_t latents;
  double tolerance;
  int64_t max_iterations;
} tacext_cuda_perturbation_problem;

typedef struct {
  double* perturbation;
  double* norm;
  double* multipliers;
  int32_t* status;
  int64_t* iterations;
  int64_t* active;
  double* primal_residual;
  double* dual_residual;
  double* gap;
} tacext_cuda_perturbation_result;

/* Values of tacext::Status. */
#define TACEXT_CUDA_OPTIMAL 0
#define TACEXT_CUDA_ITERATION_LIMIT 2

/* Solves the listed classes. What the GPU cannot certify - unreachable classes, too many active
 * constraints, an ill-conditioned head - comes back as TACEXT_CUDA_ITERATION_LIMIT, for the caller
 * to solve on the CPU. workspace: as many bytes as .._workspace says, aligned to 8. */
int64_t tacext_cuda_minimal_perturbation_workspace(int64_t count, int64_t classes, int64_t latents);
int tacext_cuda_minimal_perturbation(const tacext_cuda_perturbation_problem* problem,
                                     const tacext_cuda_perturbation_result* result, void* workspace,
                                     void* stream);

/* The fields of tacext::GuardTable with the same shapes and meaning; all pointers on the device. */
#define TACEXT_CUDA_GUARD_MOST_RANKS 256
typedef struct {
  int64_t classes;
  int64_t latents;
  int64_t ranks; /* TACEXT_CUDA_GUARD_MOST_RANKS at most */
  int64_t knot_count;
  const float* mean;
  const float* inverse_spread;
  const float* basis;
  const float* near_weight;
  const float* far_weight;
  const float* direction;
  const float* location;
  const float* inverse_deviation;
  const float* knots;
  const float* exceeding;
  const float* threshold; /* one value */
  const int64_t* samples; /* one value */
} tacext_cuda_guard_table;

/* Judges `count` rows of latents and logits, contiguous and of one type, as tacext::guard_score
 * does up to rounding: sums are made in double, in an order fixed by the sizes alone. */
int tacext_cuda_guard_score(const tacext_cuda_guard_table* table, const void* latent,
                            const void* logits, tacext_cuda_type type, int64_t count, float* score,
                            float* p_value, bool* flagged, void* stream);

#ifdef __cplusplus
}
#endif
