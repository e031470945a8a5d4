#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "tacext/guard.h"
#include "tensor_checks.h"

#ifdef TACEXT_WITH_CUDA
#include "cuda_launch.h"
#endif

namespace tacext {
namespace {

constexpr const char* kOperation = "guard_score";

/// The buffers of a GuardScorer, with latents and logits of one type; see tacext::GuardTable.
struct Arguments {
  Tensor latent, logits, mean, inverse_spread, basis, near_weight, far_weight, direction, location,
      inverse_deviation, knots, exceeding, threshold, samples;

  int64_t classes() const { return mean.size(0); }
  int64_t latents() const { return mean.size(1); }
  int64_t ranks() const { return basis.size(0); }
  int64_t knot_count() const { return knots.size(0); }
};

void check_table(const char* argument, const Tensor& t, const Tensor& latent,
                 std::initializer_list<int64_t> shape, ScalarType type = ScalarType::Float) {
  check_same_device(kOperation, argument, t, "latent", latent);
  bool fits =
      t.dim() == static_cast<int64_t>(shape.size()) && t.scalar_type() == type && t.is_contiguous();
  int64_t d = 0;
  for (const int64_t length : shape) fits = fits && t.size(d++) == length;
  STD_TORCH_CHECK(fits, kOperation, ": ", argument, ": expected the guard's own contiguous ",
                  type == ScalarType::Float ? "float32" : "int64", " tensor, got ", dtype_name(t),
                  " ", shape_text(t), "; pass the buffers of one GuardScorer");
}

void check_rows(const char* argument, const Tensor& t, int64_t width) {
  check_floating(kOperation, argument, t);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width, kOperation, ": ", argument, ": expected [N, ",
                  width, "], got ", shape_text(t), "; pass those of the model that was guarded");
}

Arguments checked(Arguments a) {
  check_dim(kOperation, "mean", a.mean, 2);
  check_dim(kOperation, "basis", a.basis, 2);
  check_dim(kOperation, "knots", a.knots, 1);
  const int64_t classes = a.classes(), latents = a.latents(), ranks = a.ranks();
  check_table("mean", a.mean, a.latent, {classes, latents});
  check_table("inverse_spread", a.inverse_spread, a.latent, {latents});
  check_table("basis", a.basis, a.latent, {ranks, latents});
  check_table("near_weight", a.near_weight, a.latent, {ranks + 1});
  check_table("far_weight", a.far_weight, a.latent, {ranks + 1});
  check_table("direction", a.direction, a.latent, {classes, latents});
  check_table("location", a.location, a.latent, {classes, 4});
  check_table("inverse_deviation", a.inverse_deviation, a.latent, {classes, 4});
  check_table("knots", a.knots, a.latent, {a.knot_count()});
  check_table("exceeding", a.exceeding, a.latent, {a.knot_count() + 1});
  check_table("threshold", a.threshold, a.latent, {});
  check_table("samples", a.samples, a.latent, {}, ScalarType::Long);
  check_rows("latent", a.latent, latents);
  check_rows("logits", a.logits, classes);
  check_same_device(kOperation, "logits", a.logits, "latent", a.latent);
  STD_TORCH_CHECK(classes >= 2 && a.latent.size(0) == a.logits.size(0), kOperation,
                  ": logits: expected as many rows as latent has, ", a.latent.size(0), ", got ",
                  a.logits.size(0), "; pass those of the same batch");
  // All is computed in float32: two types meet there.
  const ScalarType type =
      a.latent.scalar_type() == a.logits.scalar_type() ? a.latent.scalar_type() : ScalarType::Float;
  a.latent = torch::stable::contiguous(torch::stable::to(a.latent, type));
  a.logits = torch::stable::contiguous(torch::stable::to(a.logits, type));
  return a;
}

/// Where the answers go.
struct Answer {
  Tensor score, p_value, flagged;

  explicit Answer(const Tensor& latent)
      : score(torch::stable::new_empty(latent, {latent.size(0)}, ScalarType::Float)),
        p_value(torch::stable::new_empty(latent, {latent.size(0)}, ScalarType::Float)),
        flagged(torch::stable::new_empty(latent, {latent.size(0)}, ScalarType::Bool)) {}
};

/// What tables on the CPU and on GPUs have in common.
template <class Table>
Table table_of(const Arguments& a) {
  Table t{};
  t.classes = a.classes();
  t.latents = a.latents();
  t.ranks = a.ranks();
  t.knot_count = a.knot_count();
  t.mean = const_data<float>(a.mean);
  t.inverse_spread = const_data<float>(a.inverse_spread);
  t.basis = const_data<float>(a.basis);
  t.near_weight = const_data<float>(a.near_weight);
  t.far_weight = const_data<float>(a.far_weight);
  t.direction = const_data<float>(a.direction);
  t.location = const_data<float>(a.location);
  t.inverse_deviation = const_data<float>(a.inverse_deviation);
  t.knots = const_data<float>(a.knots);
  t.exceeding = const_data<float>(a.exceeding);
  return t;
}

using Answers = std::tuple<Tensor, Tensor, Tensor>;

Answers judge_on_cpu(const Arguments& a) {
  const int64_t behind = *const_data<int64_t>(a.samples);
  STD_TORCH_CHECK(behind >= 1, kOperation, ": samples: expected 1 or more, got ", behind,
                  "; pass those behind the p-values");
  Answer found(a.latent);
  auto table = table_of<GuardTable>(a);
  table.threshold = *const_data<float>(a.threshold);
  table.samples = behind;
  const GuardAnswer answer{mutable_data<float>(found.score), mutable_data<float>(found.p_value),
                           mutable_data<bool>(found.flagged)};
  dispatch_floating(a.latent.scalar_type(), [&](auto element) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
    guard_score<T>(table,
                   {const_data<T>(a.latent), a.latents(), const_data<T>(a.logits), a.classes(),
                    a.latent.size(0)},
                   answer, torch_parallel);
  });
  return {found.score, found.p_value, found.flagged};
}

#ifdef TACEXT_WITH_CUDA
Answers judge_on_cuda(const Arguments& a) {
  const CudaScope scope(a.latent);
  STD_TORCH_CHECK(a.ranks() <= TACEXT_CUDA_GUARD_MOST_RANKS, kOperation, ": basis: expected ",
                  TACEXT_CUDA_GUARD_MOST_RANKS, " rows at most on a GPU, got ", a.ranks(),
                  "; use GuardScorer.plain, or move the tensors with .cpu()");
  Answer found(a.latent);
  auto table = table_of<tacext_cuda_guard_table>(a);
  table.threshold = const_data<float>(a.threshold);
  table.samples = const_data<int64_t>(a.samples);
  scope.check(kOperation, tacext_cuda_guard_score(
                              &table, a.latent.const_data_ptr(), a.logits.const_data_ptr(),
                              cuda_type(a.latent), a.latent.size(0),
                              mutable_data<float>(found.score), mutable_data<float>(found.p_value),
                              mutable_data<bool>(found.flagged), scope.stream()));
  return {found.score, found.p_value, found.flagged};
}
#else
Answers judge_on_cuda(const Arguments&) { throw_built_without_cuda(kOperation); }
#endif

template <Answers (*judge)(const Arguments&)>
Answers guard_score_by(const Tensor& latent, const Tensor& logits, const Tensor& mean,
                       const Tensor& inverse_spread, const Tensor& basis, const Tensor& near_weight,
                       const Tensor& far_weight, const Tensor& direction, const Tensor& location,
                       const Tensor& inverse_deviation, const Tensor& knots,
                       const Tensor& exceeding, const Tensor& threshold, const Tensor& samples) {
  return judge(
      checked({latent, logits, mean, inverse_spread, basis, near_weight, far_weight, direction,
               location, inverse_deviation, knots, exceeding, threshold, samples}));
}

}  // namespace
}  // namespace tacext

STABLE_TORCH_LIBRARY_FRAGMENT(tacext, m) {
  m.def(
      "guard_score(Tensor latent, Tensor logits, Tensor mean, Tensor inverse_spread, Tensor basis, "
      "Tensor near_weight, Tensor far_weight, Tensor direction, Tensor location, Tensor "
      "inverse_deviation, Tensor knots, Tensor exceeding, Tensor threshold, Tensor samples) -> "
      "(Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CPU, m) {
  m.impl("guard_score", TORCH_BOX(&tacext::guard_score_by<tacext::judge_on_cpu>));
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CUDA, m) {
  m.impl("guard_score", TORCH_BOX(&tacext::guard_score_by<tacext::judge_on_cuda>));
}
