// One launch over many tensors: a table of them in the kernel's arguments, chunks of equal work, 16 bytes per load.
//
// A block works on one chunk of one tensor. Tables are kernel arguments, not device memory: nothing has to stay alive
// for a captured graph or another stream, and no copy precedes a launch.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/layouts.h"
#include "common/macros.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"

namespace selfsup_kernels::cuda {

using torch::headeronly::ScalarType;

// With 64 registers per thread an SM holds 4 blocks, which have 4 * 256 * 4 * 32 bytes = 128 KB of reads of two tensors
// in flight. Latency times bandwidth is only 25 KB, so that a block has time to search for its tensor first.
constexpr int list_threads = 256;
constexpr int list_unroll = 4;

// Kernels take up to 32,764 bytes of arguments; launches with at most 4,096 bytes are the cheapest.
constexpr size_t argument_limit = 32764;
constexpr size_t small_argument_limit = 4096;

// Floating dtypes are numbered, so that a block can select the code for its tensor's dtype.
template <typename T>
struct Dtype {
  using type = T;
};
inline int dtype_number(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return 0;
    case ScalarType::Double:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Half:
      return 3;
    default:
      STD_TORCH_CHECK(false, "expected a float64, float32, bfloat16 or float16 tensor");
  }
}
inline int dtype_size(int number) { return number == 0 ? 4 : number == 1 ? 8 : 2; }
template <typename F>
SK_HOST_DEVICE inline void with_dtype(int number, F f) {
  switch (number) {
    case 0:
      return f(Dtype<float>());
    case 1:
      return f(Dtype<double>());
    case 2:
      return f(Dtype<BFloat16>());
    default:
      return f(Dtype<Half>());
  }
}

// The elements of one load (16 bytes of the widest dtype), and of a block's chunk.
SK_HOST_DEVICE constexpr int elements_of_vector(int widest) { return 16 / widest; }
SK_HOST_DEVICE constexpr int elements_of_chunk(int widest) {
  return elements_of_vector(widest) * list_threads * list_unroll;
}

// `streams`: the tensors' indices in the user's list. `first`: their first chunks, then the number of all chunks.
template <int pointers_, int capacity_>
struct TensorTable {
  static constexpr int pointers = pointers_, capacity = capacity_;
  void* address[pointers][capacity];
  int64_t count[capacity];
  uint32_t first[capacity + 1];
  uint32_t streams[capacity];
  uint8_t kind[capacity];
  int tensors;
};
// The number of tensors that fit into `bytes` of arguments, of which `other` are taken.
constexpr int table_capacity(int pointers, size_t bytes, size_t other) {
  return static_cast<int>((bytes - other - 32) / (8 * pointers + 17));
}

// The tensor that a chunk belongs to: the last one whose first chunk is not after it.
template <typename Table>
__device__ inline int tensor_of_chunk(const Table& table, uint32_t chunk) {
  int low = 0, high = table.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// One entry of the host's list. `widest` is the size of its widest dtype, which sets the chunk length.
template <int pointers>
struct ListItem {
  void* address[pointers];
  int64_t count;
  uint32_t stream;
  int kind, widest;
};

// Calls launch(table, chunks) for as many tables as the list needs.
template <typename Table, typename Launch>
void for_each_table(const std::vector<ListItem<Table::pointers>>& items, Launch launch) {
  constexpr int64_t most_chunks = (int64_t{1} << 31) - 1;
  Table table;
  for (size_t next = 0; next < items.size();) {
    int64_t chunks = 0;
    int n = 0;
    for (; n < Table::capacity && next < items.size(); ++n, ++next) {
      const auto& item = items[next];
      const int64_t more = (item.count - 1) / elements_of_chunk(item.widest) + 1;
      if (n > 0 && chunks + more > most_chunks) break;
      for (int k = 0; k < Table::pointers; ++k) table.address[k][n] = item.address[k];
      table.count[n] = item.count;
      table.streams[n] = item.stream;
      table.kind[n] = static_cast<uint8_t>(item.kind);
      table.first[n] = static_cast<uint32_t>(chunks);
      chunks += more;
    }
    table.first[n] = static_cast<uint32_t>(chunks);
    table.tensors = n;
    launch(table, static_cast<unsigned>(chunks));
  }
}

// N numbers as one load or store of N * sizeof(T) = 2, 4, 8 or 16 bytes.
template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <typename T, int N>
struct Pack {
  using Raw = typename Word<N * sizeof(T)>::type;
  Raw raw;
  __device__ void load(const T* p) { raw = *reinterpret_cast<const Raw*>(p); }
  __device__ void store(T* p) const { *reinterpret_cast<Raw*>(p) = raw; }
  __device__ void unpack(T (&values)[N]) const { memcpy(values, &raw, sizeof(raw)); }
  __device__ void pack(const T (&values)[N]) { memcpy(&raw, values, sizeof(raw)); }
};

__device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace selfsup_kernels::cuda
