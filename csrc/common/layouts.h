// What the multi-tensor updates of the host and of the device ask about the tensors of a pair.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace selfsup_kernels {

inline bool is_floating(torch::headeronly::ScalarType t) {
  using torch::headeronly::ScalarType;
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline bool same_shape(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// Whether the elements lie in memory without holes, in any order of the dimensions.
inline bool is_dense(const torch::stable::Tensor& t) {
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

// Whether both, of one shape, lie in memory in the same order without holes, so that they can be read as vectors.
inline bool same_dense_layout(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return is_dense(a);
}

}  // namespace selfsup_kernels
