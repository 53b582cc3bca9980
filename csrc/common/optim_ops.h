// The fused optimizer ops, which pass their arguments on to `fused_step<Rule>`. Each implementation includes this file
// once, in its namespace and after its `fused_step`, so there is no include guard.

void fused_sgd_(
    std::vector<Tensor> params,
    std::vector<Tensor> grads,
    std::vector<Tensor> momentum_buffers,
    std::vector<Tensor> targets,
    std::optional<Tensor> lr_tensor,
    double lr,
    std::optional<Tensor> ema_tensor,
    double ema,
    std::optional<Tensor> seed,
    std::optional<Tensor> scales,
    double weight_decay,
    double momentum,
    double dampening,
    bool nesterov,
    bool maximize,
    bool first) {
  const SgdSettings settings{weight_decay, momentum, dampening, nesterov, maximize, first};
  auto step = [&]<int n>(Sgd<n>, const std::vector<std::vector<Tensor>>& states) {
    fused_step<Sgd<n>>(
        "fused_sgd_", params, grads, states, targets, lr_tensor, lr, ema_tensor, ema, seed, scales, settings);
  };
  if (momentum_buffers.empty())
    step(Sgd<0>(), {});
  else
    step(Sgd<1>(), {momentum_buffers});
}

void fused_adamw_(
    std::vector<Tensor> params,
    std::vector<Tensor> grads,
    std::vector<Tensor> exp_avgs,
    std::vector<Tensor> exp_avg_sqs,
    std::vector<Tensor> targets,
    std::optional<Tensor> lr_tensor,
    double lr,
    std::optional<Tensor> ema_tensor,
    double ema,
    std::optional<Tensor> seed,
    double step,
    double beta1,
    double beta2,
    double eps,
    double weight_decay,
    bool maximize) {
  fused_step<Adamw>(
      "fused_adamw_",
      params,
      grads,
      {exp_avgs, exp_avg_sqs},
      targets,
      lr_tensor,
      lr,
      ema_tensor,
      ema,
      seed,
      std::nullopt,
      adamw_settings(step, beta1, beta2, eps, weight_decay, maximize));
}
