// A number whose dtype is known at run time, read on the device.
#pragma once

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace selfsup_kernels::cuda {

using torch::headeronly::ScalarType;

struct Number {
  const void* at = nullptr;  // null: `value`
  ScalarType dtype = ScalarType::Double;
  double value = 0;

  __device__ double read() const {
    if (at == nullptr) return value;
    switch (dtype) {
      case ScalarType::Double:
        return *static_cast<const double*>(at);
      case ScalarType::Float:
        return *static_cast<const float*>(at);
      case ScalarType::BFloat16:
        return static_cast<float>(*static_cast<const BFloat16*>(at));
      default:
        return static_cast<float>(*static_cast<const Half*>(at));
    }
  }
};

}  // namespace selfsup_kernels::cuda
