// Replaces csrc/cuda/launch.h: defines CUDA's keywords for a C++ compiler, and runs launches on the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "emulator.h"

// Emulated kernels take CPU tensors.
#define SK_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m)
#define SK_KERNEL(threads, blocks) void
#define SK_GRID_CONSTANT(type) const type&
#define __global__
#define __device__
#define __host__

#define threadIdx sk_emulator::here.thread
#define blockIdx sk_emulator::here.block
#define blockDim sk_emulator::here.threads
#define gridDim sk_emulator::here.blocks
#define __syncthreads() sk_emulator::sync_threads(__FILE__, __LINE__)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
using std::max;
using std::min;

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}

// Atomics: one thread runs at a time.
template <typename T, typename U>
inline T atomicAdd(T* p, U x) {
  T old = *p;
  *p = old + static_cast<T>(x);
  return old;
}
template <typename T, typename U>
inline T atomicExch(T* p, U x) {
  T old = *p;
  *p = static_cast<T>(x);
  return old;
}
template <typename T>
inline T atomicCAS(T* p, T expected, T x) {
  T old = *p;
  if (old == expected) *p = x;
  return old;
}

namespace sk_emulator {

template <typename T>
struct Exchange {
  T give, get;
  int from;
};
template <typename T>
T exchange(unsigned mask, T value, int from, const char* what) {
  if (mask != 0xffffffffu) std::abort();  // only whole warps are modelled
  Exchange<T> mine{value, value, from};
  warp_meet(
      [](void* const* lanes) {
        for (int k = 0; k < 32; ++k) {
          auto* lane = static_cast<Exchange<T>*>(lanes[k]);
          const int other = lane->from;
          if (other >= 0 && other < 32) lane->get = static_cast<Exchange<T>*>(lanes[other])->give;
        }
      },
      &mine,
      what);
  return mine.get;
}
inline int lane() { return static_cast<int>(here.thread.x % 32); }

}  // namespace sk_emulator

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return sk_emulator::exchange(mask, value, sk_emulator::lane() ^ lanes, "shfl.xor");
}
inline void __syncwarp(unsigned = 0xffffffffu) {
  sk_emulator::warp_meet([](void* const*) {}, nullptr, "syncwarp");
}

namespace selfsup_kernels::cuda {

using torch::stable::Tensor;

inline unsigned char* shared_memory() { return sk_emulator::here.shared; }

inline bool on_this_device(const Tensor& t) { return t.is_cpu(); }

class Device {
 public:
  explicit Device(const Tensor&) {}
  int processors() const { return sk_emulator::processors; }
  int shared_limit() const { return 99 << 10; }  // the smallest of the supported GPUs (compute capability 12.0)

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments&&... arguments) const {
    STD_TORCH_CHECK(shared <= static_cast<size_t>(shared_limit()), "emulator: too much shared memory: ", shared);
    STD_TORCH_CHECK(threads <= 1024 && threads % 32 == 0, "emulator: a block of ", threads, " threads");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    STD_TORCH_CHECK(grid.y < 65536 && grid.z < 65536, "emulator: a grid of ", grid.y, " x ", grid.z);
    std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    sk_emulator::run(grid, threads, shared, [&] { std::apply(kernel, values); });
  }
};

}  // namespace selfsup_kernels::cuda
