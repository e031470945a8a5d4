#include <gtest/gtest.h>

#include <Eigen/Dense>

#include "cholesky.h"
#include "test_support.h"

namespace tacext {
namespace {

using Eigen::MatrixXd;
using Eigen::VectorXd;

/// A random positive definite matrix of condition about 100.
MatrixXd positive_definite(int size, unsigned seed) {
  const test::Values values = test::normal_values(size * size, seed);
  const MatrixXd a = Eigen::Map<const MatrixXd>(values.data(), size, size);
  return a * a.transpose() + 0.1 * size * MatrixXd::Identity(size, size);
}

void append(PackedCholesky& factor, VectorXd column, double own) {
  factor.solve_lower(column.data());
  factor.append(column.data(), std::sqrt(own - column.squaredNorm()));
}

PackedCholesky factor_of(const MatrixXd& matrix) {
  PackedCholesky factor;
  for (int i = 0; i < matrix.rows(); ++i) append(factor, matrix.col(i).head(i), matrix(i, i));
  return factor;
}

MatrixXd without(const MatrixXd& matrix, int index) {
  std::vector<int> kept;
  for (int i = 0; i < matrix.rows(); ++i)
    if (i != index) kept.push_back(i);
  return matrix(kept, kept);
}

void expect_solves(const PackedCholesky& factor, const MatrixXd& matrix) {
  ASSERT_EQ(factor.size(), matrix.rows());
  const test::Values values = test::normal_values(matrix.rows(), 5);
  const VectorXd b = Eigen::Map<const VectorXd>(values.data(), matrix.rows());
  const MatrixXd lower = matrix.llt().matrixL();
  VectorXd x = b;
  factor.solve_lower(x.data());
  const VectorXd y = lower.triangularView<Eigen::Lower>().solve(b);
  EXPECT_LT((x - y).norm(), 1e-12 * (1 + y.norm()));
  factor.solve_upper(x.data());
  EXPECT_LT((matrix * x - b).norm(), 1e-12 * (1 + b.norm()));
}

TEST(PackedCholesky, AppendedRowsFactorTheMatrix) {
  for (int size : {1, 2, 3, 8, 17, 40}) {
    const MatrixXd matrix = positive_definite(size, size);
    expect_solves(factor_of(matrix), matrix);
  }
}

TEST(PackedCholesky, RemovesAnyRow) {
  const MatrixXd matrix = positive_definite(12, 3);
  for (int index = 0; index < 12; ++index) {
    PackedCholesky factor = factor_of(matrix);
    factor.remove(index, [](std::int64_t, double, double) {});
    expect_solves(factor, without(matrix, index));
  }
}

TEST(PackedCholesky, GrowsAgainAfterRemovals) {
  MatrixXd matrix = positive_definite(10, 4);
  PackedCholesky factor = factor_of(matrix);
  for (int index : {0, 8, 3}) {
    factor.remove(index, [](std::int64_t, double, double) {});
    matrix = without(matrix, index);
  }
  MatrixXd larger = positive_definite(8, 6);
  larger.topLeftCorner(7, 7) = matrix;
  larger(7, 7) += 10 * larger.norm();  // stays positive definite
  append(factor, larger.col(7).head(7), larger(7, 7));
  MatrixXd symmetric = larger;
  symmetric.row(7) = larger.col(7).transpose();
  expect_solves(factor, symmetric);
}

TEST(PackedCholesky, RemovesTheLastRowLeft) {
  PackedCholesky factor = factor_of(positive_definite(1, 7));
  factor.remove(0, [](std::int64_t, double, double) {});
  EXPECT_EQ(factor.size(), 0);
}

// With A = L Q, the rows of Q must turn along for A to stay.
TEST(PackedCholesky, RotationsKeepTheFactoredRows) {
  const int size = 7, index = 2;
  const MatrixXd matrix = positive_definite(size, 8);
  MatrixXd basis = MatrixXd::Identity(size, size);
  PackedCholesky factor = factor_of(matrix);
  factor.remove(index, [&](std::int64_t i, double cosine, double sine) {
    const VectorXd left = basis.row(i), right = basis.row(i + 1);
    basis.row(i) = cosine * left + sine * right;
    basis.row(i + 1) = cosine * right - sine * left;
  });
  // Row i of the remaining A is L_i of the whole matrix; L'^-1 A must be the turned basis.
  MatrixXd rows(size - 1, size);
  const MatrixXd lower = matrix.llt().matrixL();
  for (int i = 0, from = 0; from < size; ++from)
    if (from != index) rows.row(i++) = lower.row(from);
  for (int d = 0; d < size; ++d) {
    VectorXd column = rows.col(d);
    factor.solve_lower(column.data());
    EXPECT_LT((column - basis.col(d).head(size - 1)).norm(), 1e-12);
  }
}

}  // namespace
}  // namespace tacext
