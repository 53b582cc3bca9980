// Preparation of the fused optimizer steps, shared by host and device: checks, and packed copies of tensors whose
// memory layout differs from their parameter's.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/layouts.h"
#include "common/optim.h"

namespace selfsup_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One parameter with its gradient, states and target, all in one memory layout. Without a target `target` is empty.
struct StepItem {
  Tensor param, grad, target;
  std::vector<Tensor> states;
  uint32_t stream;
  bool has_target;
};

struct StepList {
  std::vector<StepItem> items;
  std::vector<std::pair<Tensor, Tensor>> write_back;  // (the user's tensor, its packed copy)

  // Copies the packed tensors back. Call it after the kernels are launched.
  void finish() {
    for (auto& [to, from] : write_back) torch::stable::copy_(to, from);
  }
};

// `fits(t)`: true if a tensor is on the device of these kernels.
template <typename Fits>
StepList step_list(
    const char* op,
    const std::vector<Tensor>& params,
    const std::vector<Tensor>& grads,
    const std::vector<std::vector<Tensor>>& states,
    const std::vector<Tensor>& targets,
    const std::optional<Tensor>& scales,
    Fits fits) {
  const size_t n = params.size();
  STD_TORCH_CHECK(grads.size() == n && targets.size() == n, op, ": expected lists of one length");
  for (const auto& list : states) STD_TORCH_CHECK(list.size() == n, op, ": expected lists of one length");
  if (scales)
    STD_TORCH_CHECK(
        fits(*scales) && scales->scalar_type() == ScalarType::Double && scales->is_contiguous() &&
            scales->numel() == static_cast<int64_t>(n),
        op,
        ": expected a contiguous float64 scale for each parameter, on their device");
  StepList list;
  // `t` in the memory layout of `order`, copied if necessary. `finish` copies back what the kernel writes to.
  auto arranged = [&](const Tensor& order, const Tensor& t, bool written) {
    if (same_dense_layout(order, t)) return t;
    Tensor packed = copy_in_order_of(order, t);
    if (written) list.write_back.push_back({t, packed});
    return packed;
  };
  for (size_t i = 0; i < n; ++i) {
    const Tensor& p = params[i];
    STD_TORCH_CHECK(fits(p) && fits(grads[i]), op, ": expected tensors of one device that this implementation takes");
    STD_TORCH_CHECK(is_floating(p.scalar_type()), op, ": expected float64, float32, bfloat16 or float16 parameters");
    auto like = [&](const Tensor& t, const char* what) {
      STD_TORCH_CHECK(
          fits(t) && same_shape(p, t) && p.scalar_type() == t.scalar_type(),
          op,
          ": expected ",
          what,
          " of the parameter's shape, dtype and device");
    };
    like(grads[i], "a gradient");
    for (const auto& state : states) like(state[i], "a state");
    if (p.numel() == 0) continue;
    const bool has_target = targets[i].numel() != 0;
    if (has_target)
      STD_TORCH_CHECK(
          fits(targets[i]) && same_shape(p, targets[i]) && is_floating(targets[i].scalar_type()),
          op,
          ": expected a floating target of the parameter's shape and device");
    Tensor order = p;
    if (!is_dense(p)) {
      order = torch::stable::contiguous(p);
      list.write_back.push_back({p, order});
    }
    StepItem item{order, arranged(order, grads[i], false), targets[i], {}, static_cast<uint32_t>(i), has_target};
    for (const auto& state : states) item.states.push_back(arranged(order, state[i], true));
    if (has_target) item.target = arranged(order, targets[i], true);
    list.items.push_back(std::move(item));
  }
  return list;
}

inline AdamwSettings adamw_settings(
    double step, double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  return {
      weight_decay,
      beta1,
      beta2,
      eps,
      1 / (1 - std::pow(beta1, step)),
      1 / std::sqrt(1 - std::pow(beta2, step)),
      maximize};
}

}  // namespace selfsup_kernels
