// A number that may be in device memory, where the kernel reads it, so that the host does not wait for it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/macros.h"
#include "cuda/launch.h"

namespace selfsup_kernels::cuda {

using c10::BFloat16;
using c10::Half;
using torch::headeronly::ScalarType;

// True if both tensors are on the same device, one that these kernels run on.
inline bool on_one_device(const Tensor& a, const Tensor& b) {
  return on_this_device(a) && on_this_device(b) && a.get_device_index() == b.get_device_index();
}

// A number, or a tensor of one number: the kernel reads a tensor on the device, the host one on the host.
struct Number {
  const void* on_device = nullptr;
  ScalarType dtype = ScalarType::Double;
  double value = 0;

  explicit Number(double value) : value(value) {}
  // `like` is on the kernel's device.
  Number(const Tensor& t, const Tensor& like) : on_device(t.const_data_ptr()), dtype(t.scalar_type()) {
    if (on_one_device(t, like)) return;
    STD_TORCH_CHECK(t.is_cpu(), "expected a number on the device of the tensors or on the host");
    value = read();
    on_device = nullptr;
  }
  SK_HOST_DEVICE double read() const {
    if (on_device == nullptr) return value;
    switch (dtype) {
      case ScalarType::Double:
        return *static_cast<const double*>(on_device);
      case ScalarType::Float:
        return *static_cast<const float*>(on_device);
      case ScalarType::BFloat16:
        return static_cast<float>(*static_cast<const BFloat16*>(on_device));
      default:
        return static_cast<float>(*static_cast<const Half*>(on_device));
    }
  }
};

}  // namespace selfsup_kernels::cuda
