// Kernels that test the emulator itself, some of them wrong on purpose.
#include <cstdint>
#include <string>

#include "cuda/launch.h"

namespace {

using namespace selfsup_kernels::cuda;

// out[block] <- the sum of the block's 64 numbers: within warps by shuffles, across them through shared memory.
SK_KERNEL(64, 1) sum_kernel(const float* in, float* out) {
  float* partial = reinterpret_cast<float*>(shared_memory());
  float x = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(0xffffffffu, x, k);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();  // barrier of sum_kernel
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1];
}

SK_KERNEL(32, 1) past_the_end_kernel(int bytes) { shared_memory()[bytes + threadIdx.x] = 1; }
SK_KERNEL(64, 1) divergent_kernel() {
  if (threadIdx.x < 32) __syncwarp();
  if (threadIdx.x == 40) return;
  if (threadIdx.x >= 32) __shfl_xor_sync(0xffffffffu, 1, 0);
}

std::string message;

}  // namespace

extern "C" {

// Runs the kernel of that name. Returns null, or the emulator's error message.
const char* sk_selftest(const char* kernel, const void* a, const void* b, void* out, int n) {
  const std::string name = kernel;
  auto f = static_cast<float*>(out);
  try {
    std::function<void()> body;
    if (name == "sum")
      sk_emulator::run(dim3(n), 64, 8, [&] { sum_kernel(static_cast<const float*>(a), f); });
    else if (name == "past the end")
      sk_emulator::run(1, 32, n, [&] { past_the_end_kernel(n); });
    else if (name == "divergent")
      sk_emulator::run(1, 64, 0, [&] { divergent_kernel(); });
    else
      return "no such kernel";
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
}
