// The ops fused_sgd_.cpu and fused_adamw_.cpu: an optimizer step and the moving average of its parameters in one pass
// over memory.
//
// The loops are scalar and share the GPU's arithmetic in common/optim.h. The compiler vectorises them for float and
// double, which is enough, as the work is memory-bound.
#include "common/optim_lists.h"
#include "cpu/rows.h"

namespace selfsup_kernels {

namespace {

constexpr int64_t span_length = 1 << 14;

// The numbers that all tensors of a call share.
template <typename Rule>
struct StepNumbers {
  typename Rule::Settings settings;
  double lr, weight;
  const double* scales;
  const int64_t* seed;
};

template <typename Rule, typename P, typename T, bool has_target>
void step_span(const StepItem& item, const StepNumbers<Rule>& numbers, int64_t begin, int64_t end) {
  constexpr int states = Rule::states;
  using A = ArithmeticOf<P>;
  const typename Rule::template Step<A> step(
      numbers.settings, numbers.lr, numbers.scales ? numbers.scales[item.stream] : 1.0);
  const auto weight = static_cast<ArithmeticOf<T>>(numbers.weight);
  // These pointers do not alias.
  P* __restrict param = static_cast<P*>(item.param.mutable_data_ptr());
  const P* __restrict grad = static_cast<const P*>(item.grad.const_data_ptr());
  T* __restrict target = has_target ? static_cast<T*>(item.target.mutable_data_ptr()) : nullptr;
  P* __restrict state0 = states > 0 ? static_cast<P*>(item.states[0].mutable_data_ptr()) : nullptr;
  P* __restrict state1 = states > 1 ? static_cast<P*>(item.states[1].mutable_data_ptr()) : nullptr;
  auto element = [&](int64_t k) {
    A wide[2] = {};
    if constexpr (states > 0) wide[0] = static_cast<A>(state0[k]);
    if constexpr (states > 1) wide[1] = static_cast<A>(state1[k]);
    const P p = static_cast<P>(step(static_cast<A>(param[k]), static_cast<A>(grad[k]), wide));
    param[k] = p;
    if constexpr (states > 0) state0[k] = static_cast<P>(wide[0]);
    if constexpr (states > 1) state1[k] = static_cast<P>(wide[1]);
    return p;
  };
  if constexpr (!has_target) {
    for (int64_t k = begin; k < end; ++k) element(k);
  } else {
    // Average a block with lerp, and again with `averaged` if a result is not finite, which is rare: a branch for each
    // element would prevent vectorisation.
    using B = ArithmeticOf<T>;
    constexpr int64_t block = 512;
    for (int64_t first = begin; first < end; first += block) {
      const int64_t count = std::min(block, end - first);
      B mean[block];
      int unusual = 0;
      for (int64_t j = 0; j < count; ++j) element(first + j);
      for (int64_t j = 0; j < count; ++j)
        mean[j] = lerp<B, B>(static_cast<B>(target[first + j]), static_cast<B>(param[first + j]), weight);
      for (int64_t j = 0; j < count; ++j) unusual |= mean[j] - mean[j] != B(0);
      if (unusual)
        for (int64_t j = 0; j < count; ++j) mean[j] = averaged(target[first + j], param[first + j], weight);
      if constexpr (sizeof(T) == 2) {
        if (numbers.seed) {
          for (int64_t j = 0; j < count; ++j) {
            const uint64_t k = first + j;
            target[k] = round_stochastically<T>(
                mean[j], random_bits<uint32_t>(random_stream(*numbers.seed, item.stream, k), static_cast<uint32_t>(k)));
          }
          continue;
        }
      }
      for (int64_t j = 0; j < count; ++j) target[first + j] = static_cast<T>(mean[j]);
    }
  }
}

template <typename F>
void with_dtype(Storage storage, F f) {
  switch (storage) {
    case Storage::Float:
      return f(float());
    case Storage::Double:
      return f(double());
    case Storage::BFloat16:
      return f(c10::BFloat16());
    case Storage::Float16:
      return f(c10::Half());
  }
}

template <typename Rule>
void fused_step(
    const char* op,
    const std::vector<Tensor>& params,
    const std::vector<Tensor>& grads,
    const std::vector<std::vector<Tensor>>& states,
    const std::vector<Tensor>& targets,
    const std::optional<Tensor>& lr_tensor,
    double lr,
    const std::optional<Tensor>& ema_tensor,
    double ema,
    const std::optional<Tensor>& seed,
    const std::optional<Tensor>& scales,
    const typename Rule::Settings& settings) {
  StepList list = step_list(op, params, grads, states, targets, scales, [](const Tensor& t) { return t.is_cpu(); });
  if (seed)
    STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long, op, ": expected a seed of int64");
  const StepNumbers<Rule> numbers{
      settings,
      lr_tensor ? read_number(*lr_tensor) : lr,
      1 - (ema_tensor ? read_number(*ema_tensor) : ema),
      scales ? static_cast<const double*>(scales->const_data_ptr()) : nullptr,
      seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr};

  // Threads take ranges of equal length of the concatenated tensors.
  std::vector<int64_t> before{0};
  for (const StepItem& item : list.items) before.push_back(before.back() + item.param.numel());
  torch::stable::parallel_for(0, before.back(), span_length, [&](int64_t begin, int64_t end) {
    size_t k = std::upper_bound(before.begin(), before.end(), begin) - before.begin() - 1;
    for (; k < list.items.size() && before[k] < end; ++k) {
      const StepItem& item = list.items[k];
      const int64_t from = std::max(begin, before[k]) - before[k], to = std::min(end, before[k + 1]) - before[k];
      with_dtype(storage_of(item.param.scalar_type()), [&]<typename P>(P) {
        if (!item.has_target) return step_span<Rule, P, P, false>(item, numbers, from, to);
        with_dtype(storage_of(item.target.scalar_type()), [&]<typename T>(T) {
          step_span<Rule, P, T, true>(item, numbers, from, to);
        });
      });
    }
  });
  list.finish();
}

}  // namespace

#include "common/optim_ops.h"

}  // namespace selfsup_kernels

STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m) {
  m.impl("fused_sgd_.cpu", TORCH_BOX(&selfsup_kernels::fused_sgd_));
  m.impl("fused_adamw_.cpu", TORCH_BOX(&selfsup_kernels::fused_adamw_));
}
