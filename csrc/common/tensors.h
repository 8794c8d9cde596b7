// From torch's stable tensors to the plain data that kernels read.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/scalar.h"

namespace prfl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Scalar scalar_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Scalar::f32;
    case ScalarType::Double: return Scalar::f64;
    case ScalarType::Half: return Scalar::f16;
    case ScalarType::BFloat16: return Scalar::bf16;
    default: STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

inline ScalarType torch_type(Scalar scalar) {
  switch (scalar) {
    case Scalar::f32: return ScalarType::Float;
    case Scalar::f64: return ScalarType::Double;
    case Scalar::f16: return ScalarType::Half;
    case Scalar::bf16: return ScalarType::BFloat16;
  }
  STD_TORCH_CHECK(false, "no such dtype: ", static_cast<int>(scalar));
}

inline Scalar scalar_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 3, "no such dtype: ", number);
  return static_cast<Scalar>(number);
}

inline Tensor empty_of(const Tensor& like, Scalar scalar) {
  return torch::stable::empty(like.sizes(), torch_type(scalar), std::nullopt, like.device());
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace prfl
