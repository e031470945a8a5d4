#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "tacext/half.h"
#include "tacext/parallel.h"

// What every operator's glue shares: checks that word their errors alike, dtype dispatch, threads.
// Messages read `operation: argument: expected ..., got ...; way out`.
namespace tacext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:  // rarer ones go by torch's name in C++
      return torch::headeronly::toString(t.scalar_type());
  }
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline std::string device_text(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_floating(const char* operation, const char* argument, const Tensor& t) {
  STD_TORCH_CHECK(is_floating(t.scalar_type()), operation, ": ", argument,
                  ": expected float64, float32, float16 or bfloat16, got ", dtype_name(t),
                  "; convert it with .float()");
}

inline void check_dim(const char* operation, const char* argument, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, operation, ": ", argument, ": expected ", dim,
                  dim == 1 ? " dimension, got " : " dimensions, got ", t.dim(), "; reshape it");
}

inline void check_same_device(const char* operation, const char* argument, const Tensor& t,
                              const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(
      t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), operation,
      ": ", argument, ": expected ", device_text(other), ", the device of ", other_name, ", got ",
      device_text(t), "; move one with .to()");
}

/// Calls body with a null pointer whose type is the CPU core's element type of `type`.
template <class Body>
void dispatch_floating(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(static_cast<const float*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<const double*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<const Half*>(nullptr));
    default:
      return body(static_cast<const BFloat16*>(nullptr));
  }
}

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor as_float64(const Tensor& t) {
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Double));
}

/// The core's loop on torch's own threads.
inline void torch_parallel(int64_t count, int64_t grain, const RangeBody& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

/// What a CUDA tensor meets in a build without the kernels.
[[noreturn]] inline void throw_built_without_cuda(const char* operation) {
  STD_TORCH_CHECK(
      false, operation,
      ": device: expected a CPU tensor, got a CUDA tensor, and this build of tacext has "
      "no CUDA kernels; move the tensor with .cpu(), or rebuild with nvcc at hand: pip "
      "install . -C cmake.define.TACEXT_CUDA=ON");
  __builtin_unreachable();
}

}  // namespace tacext
