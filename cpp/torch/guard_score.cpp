#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "tacext/guard.h"
#include "tensor_checks.h"

namespace tacext {
namespace {

constexpr const char* kOperation = "guard_score";

void check_table(const char* argument, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size()) && !t.is_cuda() &&
              t.scalar_type() == ScalarType::Float && t.is_contiguous();
  int64_t d = 0;
  for (const int64_t length : shape) fits = fits && t.size(d++) == length;
  STD_TORCH_CHECK(fits, kOperation, ": ", argument,
                  ": expected the guard's own contiguous float32 tensor, got ", dtype_name(t), " ",
                  shape_text(t), "; pass the buffers of one GuardScorer");
}

void check_rows(const char* argument, const Tensor& t, int64_t width) {
  check_floating(kOperation, argument, t);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width, kOperation, ": ", argument, ": expected [N, ",
                  width, "], got ", shape_text(t), "; pass those of the model that was guarded");
}

std::tuple<Tensor, Tensor, Tensor> guard_score_cpu(
    const Tensor& latent, const Tensor& logits, const Tensor& mean, const Tensor& inverse_spread,
    const Tensor& basis, const Tensor& near_weight, const Tensor& far_weight,
    const Tensor& direction, const Tensor& location, const Tensor& inverse_deviation,
    const Tensor& knots, const Tensor& exceeding, const Tensor& threshold, int64_t samples) {
  check_dim(kOperation, "mean", mean, 2);
  check_dim(kOperation, "basis", basis, 2);
  check_dim(kOperation, "knots", knots, 1);
  const int64_t classes = mean.size(0), latents = mean.size(1), ranks = basis.size(0);
  check_table("mean", mean, {classes, latents});
  check_table("inverse_spread", inverse_spread, {latents});
  check_table("basis", basis, {ranks, latents});
  check_table("near_weight", near_weight, {ranks + 1});
  check_table("far_weight", far_weight, {ranks + 1});
  check_table("direction", direction, {classes, latents});
  check_table("location", location, {classes, 4});
  check_table("inverse_deviation", inverse_deviation, {classes, 4});
  check_table("knots", knots, {knots.size(0)});
  check_table("exceeding", exceeding, {knots.size(0) + 1});
  check_table("threshold", threshold, {});
  STD_TORCH_CHECK(samples >= 1, kOperation, ": samples: expected 1 or more, got ", samples,
                  "; pass those behind the p-values");
  check_rows("latent", latent, latents);
  check_rows("logits", logits, classes);
  STD_TORCH_CHECK(classes >= 2 && latent.size(0) == logits.size(0), kOperation,
                  ": logits: expected as many rows as latent has, ", latent.size(0), ", got ",
                  logits.size(0), "; pass those of the same batch");
  // All is computed in float32: two types meet there.
  const ScalarType type =
      latent.scalar_type() == logits.scalar_type() ? latent.scalar_type() : ScalarType::Float;
  const Tensor phi = torch::stable::contiguous(torch::stable::to(latent, type));
  const Tensor z = torch::stable::contiguous(torch::stable::to(logits, type));
  const int64_t count = phi.size(0);
  Tensor score = torch::stable::new_empty(phi, {count}, ScalarType::Float);
  Tensor p_value = torch::stable::new_empty(phi, {count}, ScalarType::Float);
  Tensor flagged = torch::stable::new_empty(phi, {count}, ScalarType::Bool);
  const GuardTable table{classes,
                         latents,
                         ranks,
                         knots.size(0),
                         const_data<float>(mean),
                         const_data<float>(inverse_spread),
                         const_data<float>(basis),
                         const_data<float>(near_weight),
                         const_data<float>(far_weight),
                         const_data<float>(direction),
                         const_data<float>(location),
                         const_data<float>(inverse_deviation),
                         const_data<float>(knots),
                         const_data<float>(exceeding),
                         *const_data<float>(threshold),
                         samples};
  const GuardAnswer answer{mutable_data<float>(score), mutable_data<float>(p_value),
                           mutable_data<bool>(flagged)};
  dispatch_floating(type, [&](auto element) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
    guard_score<T>(table, {const_data<T>(phi), latents, const_data<T>(z), classes, count}, answer,
                   torch_parallel);
  });
  return {score, p_value, flagged};
}

}  // namespace
}  // namespace tacext

STABLE_TORCH_LIBRARY_FRAGMENT(tacext, m) {
  m.def(
      "guard_score(Tensor latent, Tensor logits, Tensor mean, Tensor inverse_spread, Tensor basis, "
      "Tensor near_weight, Tensor far_weight, Tensor direction, Tensor location, Tensor "
      "inverse_deviation, Tensor knots, Tensor exceeding, Tensor threshold, int samples) -> "
      "(Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(tacext, CPU, m) {
  m.impl("guard_score", TORCH_BOX(&tacext::guard_score_cpu));
}
