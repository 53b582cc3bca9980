// The ops fused_sgd_.cuda and fused_adamw_.cuda: an optimizer step and the moving average of its parameters in one pass
// over memory, with one launch for each five hundred tensors or so.
#include "common/optim_lists.h"
#include "cuda/multi_tensor.h"

namespace selfsup_kernels::cuda {

namespace {

// Four or five tensors are read at once: two loads of each put as many bytes in flight as four loads of two tensors.
constexpr int step_unroll = 2;
static_assert(list_unroll % step_unroll == 0);

template <typename Rule>
struct StepNumbers {
  Number lr, ema;
  const double* scales;  // one for each parameter, on the device, or null
  const int64_t* seed;
  typename Rule::Settings settings;
};
// Addresses: parameter, gradient, target (null if none), states. The kind is 4 * parameter dtype + target dtype.
template <typename Rule>
struct StepParameters {
  TensorTable<3 + Rule::states, table_capacity(3 + Rule::states, argument_limit, sizeof(StepNumbers<Rule>))> table;
  StepNumbers<Rule> numbers;
};

template <typename Rule, typename P, typename T>
struct Chunk {
  using A = ArithmeticOf<P>;
  static constexpr int states = Rule::states;
  P* param;
  const P* grad;
  T* target;
  P* state[states > 0 ? states : 1];
  typename Rule::template Step<A> step;
  ArithmeticOf<T> weight;
  bool random;
  RandomStream stream;
  uint32_t low;  // lower 32 bits of the index of the chunk's first element

  // Updates the loaded values of one element in place.
  __device__ void update(P& p, P g, T& t, P* s, int at) const {
    A wide[states > 0 ? states : 1];
#pragma unroll
    for (int k = 0; k < states; ++k) wide[k] = static_cast<A>(s[k]);
    p = static_cast<P>(step(static_cast<A>(p), static_cast<A>(g), wide));
#pragma unroll
    for (int k = 0; k < states; ++k) s[k] = static_cast<P>(wide[k]);
    if (!target) return;
    const auto value = averaged(t, p, weight);
    if constexpr (sizeof(T) == 2) {
      if (random) {
        t = round_stochastically<T>(value, random_bits<uint32_t>(stream, low + at));
        return;
      }
    }
    t = static_cast<T>(value);
  }

  __device__ bool aligned() const {
    bool result = is_aligned(param) && is_aligned(grad) && is_aligned(target);
#pragma unroll
    for (int k = 0; k < states; ++k) result = result && is_aligned(state[k]);
    return result;
  }

  __device__ void element(int at) const {
    P p = param[at], s[states > 0 ? states : 1];
    T t{};
    if (target) t = target[at];
#pragma unroll
    for (int k = 0; k < states; ++k) s[k] = state[k][at];
    update(p, grad[at], t, s, at);
    param[at] = p;
    if (target) target[at] = t;
#pragma unroll
    for (int k = 0; k < states; ++k) state[k][at] = s[k];
  }

  __device__ void run(int left) const {
    constexpr int n = elements_of_vector(sizeof(P) > sizeof(T) ? sizeof(P) : sizeof(T));
    const int thread = threadIdx.x;
    if (!aligned()) {
#pragma unroll 4
      for (int at = thread; at < left; at += list_threads) element(at);
      return;
    }
#pragma unroll 1
    for (int start = 0; start < list_unroll * list_threads * n; start += step_unroll * list_threads * n) {
      Pack<P, n> p[step_unroll], g[step_unroll], s[step_unroll][states > 0 ? states : 1];
      Pack<T, n> t[step_unroll];
#pragma unroll
      for (int u = 0; u < step_unroll; ++u) {
        const int at = start + (u * list_threads + thread) * n;
        if (at + n > left) continue;
        p[u].load(param + at);
        g[u].load(grad + at);
        if (target) t[u].load(target + at);
#pragma unroll
        for (int k = 0; k < states; ++k) s[u][k].load(state[k] + at);
      }
#pragma unroll
      for (int u = 0; u < step_unroll; ++u) {
        const int at = start + (u * list_threads + thread) * n;
        if (at + n > left) continue;
        P old[n], slope[n], held[states > 0 ? states : 1][n];
        T average[n];
        p[u].unpack(old);
        g[u].unpack(slope);
        t[u].unpack(average);
#pragma unroll
        for (int k = 0; k < states; ++k) s[u][k].unpack(held[k]);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          P one[states > 0 ? states : 1];
#pragma unroll
          for (int k = 0; k < states; ++k) one[k] = held[k][j];
          update(old[j], slope[j], average[j], one, at + j);
#pragma unroll
          for (int k = 0; k < states; ++k) held[k][j] = one[k];
        }
        p[u].pack(old);
        p[u].store(param + at);
        if (target) {
          t[u].pack(average);
          t[u].store(target + at);
        }
#pragma unroll
        for (int k = 0; k < states; ++k) {
          s[u][k].pack(held[k]);
          s[u][k].store(state[k] + at);
        }
      }
    }
    const int at = left / n * n + thread;
    if (at < left) element(at);
  }
};

template <typename Rule>
SK_KERNEL(list_threads, 2)
step_kernel(SK_GRID_CONSTANT(StepParameters<Rule>) parameters) {
  const auto& table = parameters.table;
  const auto& numbers = parameters.numbers;
  const uint32_t chunk = blockIdx.x;
  const int tensor = tensor_of_chunk(table, chunk);
  const int kind = table.kind[tensor];
  const uint32_t place = table.streams[tensor];
  const double scale = numbers.scales ? numbers.scales[place] : 1.0;
  const double lr = numbers.lr.read(), weight = 1 - numbers.ema.read();
  with_dtype(kind / 4, [&](auto param) {
    with_dtype(kind % 4, [&](auto target) {
      using P = typename decltype(param)::type;
      using T = typename decltype(target)::type;
      constexpr int elements = elements_of_chunk(sizeof(P) > sizeof(T) ? sizeof(P) : sizeof(T));
      const int64_t first = static_cast<int64_t>(chunk - table.first[tensor]) * elements;
      const int64_t rest = table.count[tensor] - first;
      auto at = [&](int k) { return static_cast<P*>(table.address[k][tensor]) + first; };
      T* average = static_cast<T*>(table.address[2][tensor]);
      Chunk<Rule, P, T> work{
          at(0),
          at(1),
          average ? average + first : nullptr,
          {},
          typename Rule::template Step<ArithmeticOf<P>>(numbers.settings, lr, scale),
          static_cast<ArithmeticOf<T>>(weight),
          false,
          {},
          static_cast<uint32_t>(first)};
#pragma unroll
      for (int k = 0; k < Rule::states; ++k) work.state[k] = at(3 + k);
      if (sizeof(T) == 2 && numbers.seed) {
        work.random = true;
        work.stream = random_stream(*numbers.seed, place, static_cast<uint64_t>(first));
      }
      work.run(static_cast<int>(rest < elements ? rest : elements));
    });
  });
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
  if (params.empty()) return;
  const Device device(params[0]);
  auto fits = [&](const Tensor& t) { return on_one_device(t, params[0]); };
  StepList list = step_list(op, params, grads, states, targets, scales, fits);
  if (seed) STD_TORCH_CHECK(fits(*seed) && seed->scalar_type() == ScalarType::Long, op, ": expected a seed of int64");
  const StepNumbers<Rule> numbers{
      lr_tensor ? Number(*lr_tensor, params[0]) : Number(lr),
      ema_tensor ? Number(*ema_tensor, params[0]) : Number(ema),
      scales ? static_cast<const double*>(scales->const_data_ptr()) : nullptr,
      seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr,
      settings};
  std::vector<ListItem<3 + Rule::states>> items;
  for (const StepItem& item : list.items) {
    const int from = dtype_number(item.param.scalar_type());
    const int to = item.has_target ? dtype_number(item.target.scalar_type()) : from;
    ListItem<3 + Rule::states> entry{
        {item.param.mutable_data_ptr(),
         const_cast<void*>(item.grad.const_data_ptr()),
         item.has_target ? item.target.mutable_data_ptr() : nullptr},
        item.param.numel(),
        item.stream,
        4 * from + to,
        std::max(dtype_size(from), dtype_size(to))};
    for (int k = 0; k < Rule::states; ++k) entry.address[3 + k] = item.states[k].mutable_data_ptr();
    items.push_back(entry);
  }
  using Table = decltype(StepParameters<Rule>::table);
  static_assert(sizeof(StepParameters<Rule>) <= argument_limit);
  for_each_table<Table>(items, [&](const Table& table, unsigned chunks) {
    device.launch(step_kernel<Rule>, dim3(chunks), list_threads, 0, StepParameters<Rule>{table, numbers});
  });
  list.finish();
}

}  // namespace

#include "common/optim_ops.h"

}  // namespace selfsup_kernels::cuda

SK_CUDA_LIBRARY(m) {
  m.impl("fused_sgd_.cuda", TORCH_BOX(&selfsup_kernels::cuda::fused_sgd_));
  m.impl("fused_adamw_.cuda", TORCH_BOX(&selfsup_kernels::cuda::fused_adamw_));
}
