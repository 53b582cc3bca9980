// The op ema_update_.cuda: one launch for each thousand tensors or so, one pass over their memory, no temporaries
// (except for pairs in different memory layouts).
#include "common/ema.h"
#include "common/layouts.h"
#include "common/rounding.h"
#include "cuda/multi_tensor.h"

namespace selfsup_kernels::cuda {

namespace {

// The kind of a pair is 4 * target + source for two floating dtypes; pairs of `copy_kind` are copied byte by byte.
constexpr int copy_kind = 16;

struct EmaNumbers {
  Number momentum;
  const int64_t* seed;  // on the device
};
template <size_t bytes>
struct EmaParameters {
  TensorTable<2, table_capacity(2, bytes, sizeof(EmaNumbers))> table;
  EmaNumbers numbers;
};
static_assert(sizeof(EmaParameters<argument_limit>) <= argument_limit);
static_assert(sizeof(EmaParameters<small_argument_limit>) <= small_argument_limit);

// t[i] <- update(t[i], s[i], i) for i < left, in one chunk. A thread issues all its loads before it waits for one.
template <typename T, typename S, typename Update>
__device__ inline void update_chunk(T* t, const S* s, int left, Update update) {
  constexpr int n = elements_of_vector(sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S));
  const int thread = threadIdx.x;
  if (is_aligned(t) && is_aligned(s)) {
    Pack<T, n> to[list_unroll];
    Pack<S, n> from[list_unroll];
#pragma unroll
    for (int u = 0; u < list_unroll; ++u) {
      const int at = (u * list_threads + thread) * n;
      if (at + n > left) continue;
      to[u].load(t + at);
      from[u].load(s + at);
    }
#pragma unroll
    for (int u = 0; u < list_unroll; ++u) {
      const int at = (u * list_threads + thread) * n;
      if (at + n > left) continue;
      T old[n];
      S now[n];
      to[u].unpack(old);
      from[u].unpack(now);
#pragma unroll
      for (int k = 0; k < n; ++k) old[k] = update(old[k], now[k], at + k);
      to[u].pack(old);
      to[u].store(t + at);
    }
    const int at = left / n * n + thread;
    if (at < left) t[at] = update(t[at], s[at], at);
    return;
  }
  // Unaligned: one element per load, with neighbouring elements in neighbouring threads.
  constexpr int several = 2 * list_unroll;
  for (int start = thread; start < left; start += several * list_threads) {
    T to[several];
    S from[several];
#pragma unroll
    for (int u = 0; u < several; ++u) {
      const int at = start + u * list_threads;
      if (at >= left) continue;
      to[u] = t[at];
      from[u] = s[at];
    }
#pragma unroll
    for (int u = 0; u < several; ++u) {
      const int at = start + u * list_threads;
      if (at < left) t[at] = update(to[u], from[u], at);
    }
  }
}

// Averages a chunk in float, or in double for a double target.
template <typename T, typename S>
__device__ inline void average_chunk(
    T* t, const S* s, int left, double weight, const int64_t* seed, uint32_t stream, uint64_t first) {
  using A = std::conditional_t<sizeof(T) == 8, double, float>;
  const A w = static_cast<A>(weight);
  auto average = [w](T a, S b) { return selfsup_kernels::average<A, A>(static_cast<A>(a), static_cast<A>(b), w); };
  if constexpr (sizeof(T) == 2) {
    if (seed) {
      // Chunk lengths are powers of two, so the elements of a chunk share the upper 32 bits of their indices.
      const RandomStream random = random_stream(*seed, stream, first);
      const uint32_t low = static_cast<uint32_t>(first);
      return update_chunk(t, s, left, [&](T a, S b, int at) {
        return round_stochastically<T>(average(a, b), random_bits<uint32_t>(random, low + at));
      });
    }
  }
  update_chunk(t, s, left, [&](T a, S b, int) { return static_cast<T>(average(a, b)); });
}

template <size_t bytes>
SK_KERNEL(list_threads, 4)
ema_kernel(SK_GRID_CONSTANT(EmaParameters<bytes>) parameters) {
  const auto& table = parameters.table;
  const EmaNumbers& numbers = parameters.numbers;
  const uint32_t chunk = blockIdx.x;
  const int tensor = tensor_of_chunk(table, chunk);
  const int kind = table.kind[tensor];
  void* target = table.address[0][tensor];
  const void* source = table.address[1][tensor];
  auto chunk_of = [&](int elements, int64_t& first, int& left) {
    first = static_cast<int64_t>(chunk - table.first[tensor]) * elements;
    const int64_t rest = table.count[tensor] - first;
    left = static_cast<int>(rest < elements ? rest : elements);
  };
  int64_t first;
  int left;
  if (kind == copy_kind) {
    chunk_of(elements_of_chunk(1), first, left);
    update_chunk(
        static_cast<uint8_t*>(target) + first,
        static_cast<const uint8_t*>(source) + first,
        left,
        [](uint8_t, uint8_t b, int) { return b; });
    return;
  }
  const double weight = 1 - numbers.momentum.read();
  with_dtype(kind / 4, [&](auto to) {
    with_dtype(kind % 4, [&](auto from) {
      using T = typename decltype(to)::type;
      using S = typename decltype(from)::type;
      chunk_of(elements_of_chunk(sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S)), first, left);
      average_chunk(
          static_cast<T*>(target) + first,
          static_cast<const S*>(source) + first,
          left,
          weight,
          numbers.seed,
          table.streams[tensor],
          static_cast<uint64_t>(first));
    });
  });
}

template <size_t bytes>
void launch(const Device& device, const std::vector<ListItem<2>>& items, const EmaNumbers& numbers) {
  using Table = decltype(EmaParameters<bytes>::table);
  for_each_table<Table>(items, [&](const Table& table, unsigned chunks) {
    device.launch(ema_kernel<bytes>, dim3(chunks), list_threads, 0, EmaParameters<bytes>{table, numbers});
  });
}

}  // namespace

void ema_update_(
    std::vector<Tensor> targets,
    std::vector<Tensor> sources,
    std::optional<Tensor> momentum_tensor,
    double momentum,
    std::optional<Tensor> seed) {
  STD_TORCH_CHECK(targets.size() == sources.size(), "ema_update_: expected lists of one length");
  if (targets.empty()) return;
  const Device device(targets[0]);
  EmaNumbers numbers{momentum_tensor ? Number(*momentum_tensor, targets[0]) : Number(momentum), nullptr};
  if (seed) {
    STD_TORCH_CHECK(
        on_this_device(*seed) && seed->scalar_type() == ScalarType::Long,
        "ema_update_: expected a seed of int64 on the device of targets");
    numbers.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }

  std::vector<ListItem<2>> items;
  std::vector<Tensor> keep;                           // packed copies, until the launch
  std::vector<std::pair<Tensor, Tensor>> write_back;  // (target, its packed copy)
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor t = targets[i], s = sources[i];
    STD_TORCH_CHECK(
        on_one_device(t, targets[0]) && on_one_device(s, targets[0]),
        "ema_update_: expected CUDA tensors of one device");
    STD_TORCH_CHECK(same_shape(t, s), "ema_update_: expected tensors of one shape");
    if (t.numel() == 0 || (t.data_ptr() == s.data_ptr() && t.scalar_type() == s.scalar_type())) continue;
    const bool average = is_floating(t.scalar_type()) && is_floating(s.scalar_type());
    if (!average && (t.scalar_type() != s.scalar_type() || !same_dense_layout(t, s))) {
      torch::stable::copy_(t, s);
      continue;
    }
    if (!same_dense_layout(t, s)) {
      // Rare (channels_last against contiguous, a column of a matrix): copy the source to the target's memory layout;
      // if the target has gaps, pack both.
      if (!is_dense(t)) {
        t = torch::stable::contiguous(t);
        write_back.push_back({targets[i], t});
      }
      if (!same_dense_layout(t, s)) {
        s = copy_in_order_of(t, s);
        keep.push_back(s);
      }
    }
    if (average) {
      const int to = dtype_number(t.scalar_type()), from = dtype_number(s.scalar_type());
      items.push_back(
          {{t.mutable_data_ptr(), const_cast<void*>(s.const_data_ptr())},
           t.numel(),
           static_cast<uint32_t>(i),
           4 * to + from,
           std::max(dtype_size(to), dtype_size(from))});
    } else {
      const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
      items.push_back(
          {{t.mutable_data_ptr(), const_cast<void*>(s.const_data_ptr())},
           bytes,
           static_cast<uint32_t>(i),
           copy_kind,
           1});
    }
  }
  if (items.size() <= decltype(EmaParameters<small_argument_limit>::table)::capacity)
    launch<small_argument_limit>(device, items, numbers);
  else
    launch<argument_limit>(device, items, numbers);
  for (auto& [target, values] : write_back) torch::stable::copy_(target, values);
}

}  // namespace selfsup_kernels::cuda

SK_CUDA_LIBRARY(m) { m.impl("ema_update_.cuda", TORCH_BOX(&selfsup_kernels::cuda::ema_update_)); }
