#include <algorithm>

#include "certificate_block.cuh"
#include "cuda_block.cuh"
#include "head_kernels.cuh"
#include "launch.cuh"

// The GPU solves, the CPU settles what the GPU could not certify: an answer counts only with the
// certificate that cpp/core demands too, and every other class (unreachable, many active
// constraints, an ill-conditioned head) is left to the caller, who solves it with the core.
namespace tacext::cuda {
namespace {

constexpr int kSolverThreads = 256;
constexpr std::int64_t kBatch = 512;     // classes solved side by side, a block each
constexpr std::int64_t kCapacity = 256;  // largest active set; heads of 1000 classes need 5 to 45

/// The workspace, cut into arrays of 8-byte values.
struct Layout {
  std::int64_t slots, capacity, total = 0;
  std::int64_t rows, mean, gram;
  std::int64_t slack, squared_lengths, products, perturbation, factor;
  std::int64_t projection, coefficients, multipliers, residual, active, outcomes;

  Layout(std::int64_t count, std::int64_t classes, std::int64_t latents)
      : slots(std::clamp<std::int64_t>(count, 1, kBatch)),
        capacity(std::min({classes - 1, latents, kCapacity})) {
    rows = take(classes * latents);
    mean = take(latents);
    gram = take(classes * classes);
    slack = take(slots * classes);
    squared_lengths = take(slots * classes);
    products = take(slots * classes);
    perturbation = take(slots * latents);
    factor = take(slots * factor_size());
    projection = take(slots * capacity);
    coefficients = take(slots * capacity);
    multipliers = take(slots * capacity);
    residual = take(slots * capacity);
    active = take(slots * capacity);
    outcomes = take(slots * kOutcomeSize);
  }

  std::int64_t factor_size() const { return capacity * (capacity + 1) / 2; }

 private:
  static constexpr std::int64_t kOutcomeSize = sizeof(Outcome) / sizeof(double);
  static_assert(sizeof(Outcome) % sizeof(double) == 0 && sizeof(std::int64_t) == sizeof(double));

  std::int64_t take(std::int64_t size) {
    const std::int64_t begin = total;
    total += size;
    return begin;
  }
};

/// Where the slots of one batch lie.
struct Slots {
  double *slack, *squared_lengths, *products, *perturbation, *factor;
  double *projection, *coefficients, *multipliers, *residual;
  std::int64_t* active;
  Outcome* outcomes;
  std::int64_t capacity;

  Slots(const Layout& at, double* workspace)
      : slack(workspace + at.slack),
        squared_lengths(workspace + at.squared_lengths),
        products(workspace + at.products),
        perturbation(workspace + at.perturbation),
        factor(workspace + at.factor),
        projection(workspace + at.projection),
        coefficients(workspace + at.coefficients),
        multipliers(workspace + at.multipliers),
        residual(workspace + at.residual),
        active(reinterpret_cast<std::int64_t*>(workspace + at.active)),
        outcomes(reinterpret_cast<Outcome*>(workspace + at.outcomes)),
        capacity(at.capacity) {}

  __device__ Slot slot(const Head& head, std::int64_t i) const {
    return {capacity,
            slack + i * head.classes,
            squared_lengths + i * head.classes,
            perturbation + i * head.latents,
            factor + i * (capacity * (capacity + 1) / 2),
            projection + i * capacity,
            coefficients + i * capacity,
            multipliers + i * capacity,
            residual + i * capacity,
            active + i * capacity};
  }
};

__device__ std::int64_t target_of(const tacext_cuda_perturbation_problem& problem,
                                  std::int64_t row) {
  return problem.targets != nullptr ? problem.targets[row] : row;
}

// Block b solves listed class begin + b from K, in its own slot; its threads share the vectors:
//
//   slack [classes]            t0 t1 t2 ... t255 t0 t1 ...    sum of active rows of K
//   x = L^-1 x [active]        the same, one barrier a column of L
//   a_i . s from W [active]    one warp an i
__global__ void __launch_bounds__(kSolverThreads, 2)
    solve_kernel(Head head, tacext_cuda_perturbation_problem problem, Slots slots,
                 std::int64_t begin, std::int64_t max_iterations) {
  CudaBlock<kSolverThreads> block;
  const std::int64_t k = target_of(problem, begin + blockIdx.x);
  const double* const margins = problem.margins + k * head.classes;
  ActiveSetSolver<CudaBlock<kSolverThreads>> solver(block, head, slots.slot(head, blockIdx.x), k,
                                                    margins);
  const Outcome outcome = solver.solve(max_iterations);
  if (outcome.ending != Ending::kSolved)  // the product that follows reads every slot
    for (std::int64_t d = threadIdx.x; d < head.latents; d += kSolverThreads)
      slots.perturbation[blockIdx.x * head.latents + d] = 0;
  if (threadIdx.x == 0) slots.outcomes[blockIdx.x] = outcome;
}

// Block b certifies listed class begin + b and writes its row of the result; threads share latents
// and classes as in solve_kernel.
__global__ void __launch_bounds__(kSolverThreads, 4)
    certify_kernel(Head head, tacext_cuda_perturbation_problem problem, Slots slots,
                   std::int64_t begin, tacext_cuda_perturbation_result result) {
  CudaBlock<kSolverThreads> block;
  const std::int64_t row = begin + blockIdx.x;
  const std::int64_t k = target_of(problem, row);
  Certifier<CudaBlock<kSolverThreads>> certifier(
      block, head, slots.slot(head, blockIdx.x), k, problem.margins + k * head.classes,
      slots.products + blockIdx.x * head.classes, problem.scale);
  certifier.write(slots.outcomes[blockIdx.x], problem.tolerance,
                  {result.perturbation + row * head.latents, result.norm + row,
                   result.multipliers + row * head.classes, result.status + row,
                   result.iterations + row, result.active + row, result.primal_residual + row,
                   result.dual_residual + row, result.gap + row});
}

void solve(Launcher& launcher, const tacext_cuda_perturbation_problem& problem,
           const tacext_cuda_perturbation_result& result, double* workspace) {
  const std::int64_t classes = problem.classes, latents = problem.latents;
  const Layout at(problem.count, classes, latents);
  const Head head{workspace + at.rows, workspace + at.gram, classes, latents};
  const Slots slots(at, workspace);
  centre_and_scale(launcher, problem.weight, problem.scale, classes, latents,
                   {workspace + at.rows, workspace + at.mean});
  gram(launcher, head.rows, classes, latents, workspace + at.gram);

  // A class that needs many more steps than it can have active constraints is cycling or close to
  // it; the CPU, which has the caller's limit, is told early instead of the others waiting for it.
  const std::int64_t max_iterations = std::min(problem.max_iterations, 10 * at.capacity + 100);
  for (std::int64_t begin = 0; begin < problem.count; begin += kBatch) {
    const std::int64_t batch = std::min(kBatch, problem.count - begin);
    launcher.run(solve_kernel, grid(batch), dim3(kSolverThreads), head, problem, slots, begin,
                 max_iterations);
    multiply_transposed(launcher, slots.perturbation, batch, head.rows, classes, latents,
                        slots.products);
    launcher.run(certify_kernel, grid(batch), dim3(kSolverThreads), head, problem, slots, begin,
                 result);
  }
}

}  // namespace
}  // namespace tacext::cuda

extern "C" std::int64_t tacext_cuda_minimal_perturbation_workspace(std::int64_t count,
                                                                   std::int64_t classes,
                                                                   std::int64_t latents) {
  return tacext::cuda::Layout(count, classes, latents).total *
         static_cast<std::int64_t>(sizeof(double));
}

extern "C" int tacext_cuda_minimal_perturbation(const tacext_cuda_perturbation_problem* problem,
                                                const tacext_cuda_perturbation_result* result,
                                                void* workspace, void* stream) {
  tacext::cuda::Launcher launcher(stream);
  if (problem->count > 0)
    tacext::cuda::solve(launcher, *problem, *result, static_cast<double*>(workspace));
  return launcher.error();
}
