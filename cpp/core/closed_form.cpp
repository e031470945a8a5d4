#include "closed_form.h"

#include <Eigen/Cholesky>
#include <Eigen/Core>

namespace tacext {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Vector = Eigen::VectorXd;

struct ClosedForm::Factor {
  Eigen::LLT<Matrix> cholesky;
  Vector ones;  // (K + c 11^T)^-1 1
};

ClosedForm::ClosedForm(std::unique_ptr<Factor> factor) : factor_(std::move(factor)) {}
ClosedForm::~ClosedForm() = default;

std::unique_ptr<ClosedForm> ClosedForm::make(const HeadGeometry& head) {
  const Eigen::Index classes = head.classes();
  if (head.latents() < classes - 1) return nullptr;
  Matrix gram = Eigen::Map<const Matrix>(head.gram_row(0), classes, classes);
  gram.array() += gram.trace() / static_cast<double>(classes);
  auto factor = std::make_unique<Factor>();
  factor->cholesky.compute(gram);
  // Negated, so that the NaN of a K that overflowed is no factor.
  if (factor->cholesky.info() != Eigen::Success || !(factor->cholesky.rcond() >= 1e-12))
    return nullptr;
  factor->ones = factor->cholesky.solve(Vector::Ones(classes));
  return std::unique_ptr<ClosedForm>(new ClosedForm(std::move(factor)));
}

std::vector<double> ClosedForm::multipliers(std::int64_t target, const double* margins) const {
  const Eigen::Index classes = factor_->ones.size();
  Vector m = Eigen::Map<const Vector>(margins, classes);
  m[target] = 0;
  const Vector x = factor_->cholesky.solve(m);
  const double t = x.sum() / factor_->ones.sum();
  std::vector<double> multipliers(static_cast<std::size_t>(classes));
  Eigen::Map<Vector>(multipliers.data(), classes) = x - t * factor_->ones;
  multipliers[target] = 0;
  return multipliers;
}

}  // namespace tacext
