// Dtype, shape and memory layout of tensor pairs, for the multi-tensor updates on host and device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

namespace selfsup_kernels {

inline bool is_floating(torch::headeronly::ScalarType t) {
  using torch::headeronly::ScalarType;
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

// The functions of layouts take a Tensor, or anything else with dim(), size(), stride() and is_contiguous().
template <typename T>
bool same_shape(const T& a, const T& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// True if the elements fill their memory without gaps, in any order of the dimensions.
template <typename T>
bool is_dense(const T& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.push_back({t.stride(d), t.size(d)});
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (auto [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// True if two tensors of one shape have the same gap-free memory layout, so that both can be read as flat arrays.
template <typename T>
bool same_dense_layout(const T& a, const T& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return is_dense(a);
}

// Copies `s` into new memory with the strides of the dense tensor `t`.
inline torch::stable::Tensor copy_in_order_of(const torch::stable::Tensor& t, const torch::stable::Tensor& s) {
  using torch::stable::Tensor;
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(t.sizes()),
      from(t.strides()),
      from(std::optional(s.scalar_type())),
      from(std::optional<torch::headeronly::Layout>()),
      from(std::optional(s.device())),
      from(std::optional<bool>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  Tensor copy = torch::stable::detail::to<Tensor>(stack[0]);
  torch::stable::copy_(copy, s);
  return copy;
}

}  // namespace selfsup_kernels
