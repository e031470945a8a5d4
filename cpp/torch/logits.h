#pragma once

#include "tacext/find_non_finite.h"
#include "tensor_checks.h"

namespace tacext {

/// The type of differences of logits: float64 stays, the rest becomes float32.
inline ScalarType margin_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
using MarginOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline void check_logits(const char* operation, const Tensor& logits) {
  check_dim(operation, "logits", logits, 2);
  check_floating(operation, "logits", logits);
}

inline void check_some_samples(const char* operation, const Tensor& logits) {
  STD_TORCH_CHECK(logits.size(0) > 0, operation,
                  ": logits: expected at least 1 sample, got none; pass a non-empty batch");
}

/// What the operator updates in place, of the given shape.
inline void check_updated(const char* operation, const char* argument, const Tensor& updated,
                          const Tensor& logits) {
  STD_TORCH_CHECK(updated.scalar_type() == margin_type(logits), operation, ": ", argument,
                  ": expected float64 for float64 logits and float32 for the rest, got ",
                  dtype_name(updated), "; make it as the result for the first batch");
  STD_TORCH_CHECK(updated.is_contiguous(), operation, ": ", argument,
                  ": expected a contiguous tensor, got a strided view; pass .contiguous()");
  check_same_device(operation, argument, updated, "logits", logits);
}

template <class T>
void check_finite_logits(const char* operation, const T* logits, int64_t samples, int64_t classes) {
  const MatrixIndex bad = find_non_finite(logits, samples, classes, torch_parallel);
  STD_TORCH_CHECK(bad.row < 0, operation,
                  ": logits: expected finite values, got NaN or infinity at [", bad.row, ", ",
                  bad.column, "]; check the model and its inputs");
}

/// Calls body(const T* values) with the element type of contiguous, finite CPU logits.
template <class Body>
void with_finite_logits(const char* operation, const Tensor& logits, const Body& body) {
  const Tensor rows = torch::stable::contiguous(logits);
  dispatch_floating(rows.scalar_type(), [&](auto type) {
    const auto* data = const_data<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(rows);
    check_finite_logits(operation, data, rows.size(0), rows.size(1));
    body(data);
  });
}

}  // namespace tacext
