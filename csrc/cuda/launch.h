// The host side shared by all CUDA ops: the device, and the function that launches a kernel.
//
// In the tests `tests/emulator/include/cuda/launch.h` replaces this file and runs the kernels on the CPU. So no other
// file uses the CUDA runtime, and kernels have dynamic shared memory only, from `shared_memory()`.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <tuple>

#define SK_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CUDA, m)
// A kernel with at most `threads` threads per block, compiled so that an SM can hold at least `blocks` blocks.
#define SK_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// A large struct of arguments, which threads read in place without a local copy.
#define SK_GRID_CONSTANT(type) const __grid_constant__ type

namespace selfsup_kernels::cuda {

using torch::stable::Tensor;

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
__device__ inline unsigned char* shared_memory() { return dynamic_shared_memory; }

inline bool on_this_device(const Tensor& t) { return t.is_cuda(); }

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Makes a tensor's device the current one, and launches on its current stream.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // The maximum shared memory per block, in bytes.
  int shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments&&... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    auto entry = reinterpret_cast<const void*>(kernel);
    if (shared > 48 * 1024)
      check(
          cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory of a kernel");
    std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    std::apply(
        [&](auto&... value) {
          void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
          check(cudaLaunchKernel(entry, grid, dim3(threads), pointers, shared, stream_), "launch of a kernel");
        },
        values);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_), "device attribute");
    return value;
  }

  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace selfsup_kernels::cuda
