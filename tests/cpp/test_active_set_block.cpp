#include <gtest/gtest.h>

#include "active_set_block.cuh"
#include "certificate_block.cuh"
#include "head_geometry.h"
#include "serial_block.h"
#include "test_support.h"

// The GPU's solver on the host, with a block of one thread, against the core.
namespace tacext::cuda {
namespace {

using test::TestHead;
using test::TestSolution;
using test::Values;

/// Solves class k with the block solver into row k of a solution.
class BlockSolver {
 public:
  BlockSolver(const TestHead& head, std::int64_t capacity)
      : head_(head),
        geometry_({head.weight.data(), head.margins.data(), nullptr, nullptr, head.classes,
                   head.classes, head.latents},
                  serial_for),
        capacity_(capacity),
        solution(head.classes, head.classes, head.latents) {}

  void solve(std::int64_t k, std::int64_t max_iterations) {
    const std::size_t classes = head_.classes, latents = head_.latents, capacity = capacity_;
    Values slack(classes), squared_lengths(classes), perturbation(latents), products(classes);
    Values factor(capacity * (capacity + 1) / 2), vectors[4];
    for (Values& vector : vectors) vector.resize(capacity);
    std::vector<std::int64_t> active(capacity);
    const Slot slot{capacity_,           slack.data(),      squared_lengths.data(),
                    perturbation.data(), factor.data(),     vectors[0].data(),
                    vectors[1].data(),   vectors[2].data(), vectors[3].data(),
                    active.data()};
    const Head head{geometry_.row(0), geometry_.gram_row(0), head_.classes, head_.latents};
    const double* const margins = head_.margins.data() + k * head_.classes;
    SerialBlock block;
    ActiveSetSolver<SerialBlock> solver(block, head, slot, k, margins);
    const Outcome outcome = solver.solve(max_iterations);
    for (std::int64_t j = 0; j < head_.classes; ++j)
      products[j] = dot(perturbation.data(), geometry_.row(j), head_.latents);
    Certifier<SerialBlock> certifier(block, head, slot, k, margins, products.data(), nullptr);
    const PerturbationResult to = solution.pointers();
    certifier.write(outcome, 1e-9,
                    {to.perturbation + k * head_.latents, to.norm + k,
                     to.multipliers + k * head_.classes, to.status + k, to.iterations + k,
                     to.active + k, to.primal_residual + k, to.dual_residual + k, to.gap + k});
    // The geometry's rows are 2^-e times the head's.
    const int exponent = -geometry_.exponent();
    to.norm[k] = std::ldexp(to.norm[k], exponent);
    multiply_by_power_of_two(solution.s(k), head_.latents, exponent,
                             to.perturbation + k * head_.latents);
    multiply_by_power_of_two(solution.l(k), head_.classes, 2 * exponent,
                             to.multipliers + k * head_.classes);
  }

 private:
  const TestHead& head_;
  const HeadGeometry geometry_;
  std::int64_t capacity_;

 public:
  TestSolution solution;
};

TestSolution solve_in_block(const TestHead& head, std::int64_t capacity = 256,
                            std::int64_t max_iterations = 10000) {
  BlockSolver solver(head, std::min({capacity, head.classes - 1, head.latents}));
  for (std::int64_t k = 0; k < head.classes; ++k) solver.solve(k, max_iterations);
  return solver.solution;
}

/// Row k is the core's answer; what the core finds unreachable is left open.
void expect_same_answer(const TestSolution& block, const TestSolution& core, std::int64_t k) {
  if (core.is(k, Status::kUnreachable)) {
    EXPECT_TRUE(block.is(k, Status::kIterationLimit)) << "unreachable is for the CPU to prove";
    return;
  }
  ASSERT_TRUE(block.is(k, Status::kOptimal));
  EXPECT_NEAR(block.norm[k], core.norm[k], 1e-10 * core.norm[k]);
  for (std::int64_t d = 0; d < core.latents; ++d)
    EXPECT_NEAR(block.s(k)[d], core.s(k)[d], 1e-8 * core.norm[k]);
  EXPECT_LE(std::max({block.primal[k], block.dual[k], block.gap[k]}), 1e-9);
  const std::int64_t positive =
      std::count_if(block.l(k), block.l(k) + core.classes, [](double l) { return l > 0; });
  EXPECT_EQ(block.active[k], positive);
}

TEST(ActiveSetBlock, EqualsTheCoreOnVariousHeads) {
  for (const test::NamedHead& named : test::various_heads()) {
    SCOPED_TRACE(named.name);
    const TestSolution core = test::solve(named.head, {1e-9, 0, false});
    const TestSolution block = solve_in_block(named.head);
    for (std::int64_t k = 0; k < named.head.classes; ++k) {
      SCOPED_TRACE(k);
      expect_same_answer(block, core, k);
    }
  }
}

TEST(ActiveSetBlock, EqualsTheCoreOnALargerHead) {
  const TestHead head = test::random_head(150, 64, 400, 40);
  const TestSolution core = test::solve(head, {1e-9, 0, false});
  const TestSolution block = solve_in_block(head);
  std::int64_t steps = 0, active = 0;
  for (std::int64_t k = 0; k < head.classes; ++k) {
    SCOPED_TRACE(k);
    expect_same_answer(block, core, k);
    steps += block.iterations[k];
    active += block.active[k];
  }
  EXPECT_GT(steps, active) << "a head on which no constraint ever leaves tests no removal";
}

TEST(ActiveSetBlock, LeavesOpenWhatExceedsItsCapacity) {
  const TestHead head = test::random_head(20, 30, 60, 42);
  const TestSolution whole = solve_in_block(head), cut = solve_in_block(head, 3);
  std::int64_t open = 0;
  for (std::int64_t k = 0; k < head.classes; ++k) {
    if (cut.is(k, Status::kOptimal)) {
      EXPECT_LE(cut.active[k], 3);
      EXPECT_EQ(cut.norm[k], whole.norm[k]);
    } else {
      ++open;
    }
  }
  EXPECT_GT(open, 0);
}

TEST(ActiveSetBlock, LeavesOpenWhatExceedsItsSteps) {
  const TestHead head = test::random_head(20, 30, 60, 43);
  const TestSolution cut = solve_in_block(head, 256, 1);
  std::int64_t open = 0;
  for (std::int64_t k = 0; k < head.classes; ++k) {
    EXPECT_LE(cut.iterations[k], 1);
    open += cut.is(k, Status::kIterationLimit);
  }
  EXPECT_GT(open, 0);
}

// A row just outside the hull of two others: s is a tiny difference of huge terms, and residuals
// taken from the Gram path say too little about its length.
TEST(ActiveSetBlock, LeavesOpenWhatNearlyCancels) {
  for (double outside : {1e-3, 1e-6}) {
    const TestHead head{3, 2, {1, 0, -1, 0, 0, outside}, Values(9, 1.0)};
    const TestSolution solution = solve_in_block(head);
    EXPECT_EQ(solution.is(2, Status::kOptimal), outside == 1e-3);
    EXPECT_NEAR(solution.norm[2], 1 / outside, 1e-6 / outside);
  }
}

TEST(ActiveSetBlock, CertifiesNothingThatIsNaN) {
  TestHead head = test::random_head(6, 8, 20, 44);
  head.margins[1 * 6 + 3] = std::numeric_limits<double>::quiet_NaN();
  head.weight[4 * 8 + 2] = std::numeric_limits<double>::quiet_NaN();
  const TestSolution solution = solve_in_block(head);
  for (std::int64_t k = 0; k < 6; ++k) EXPECT_TRUE(solution.is(k, Status::kIterationLimit)) << k;
}

}  // namespace
}  // namespace tacext::cuda
