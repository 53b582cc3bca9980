// Kernels for the tests of the emulator itself, some of them wrong on purpose.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx.h"

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

// out (16, 8) <- a (16, depth) b (8, depth)^T for one warp, rows of 32 bytes, through shared memory.
template <typename T>
SK_KERNEL(32, 1)
product_kernel(const T* a, const T* b, float* out) {
  unsigned char* x = shared_memory();
  unsigned char* y = x + 16 * 32;
  const int lane = threadIdx.x;
  async_copy_16(x + 16 * lane, reinterpret_cast<const unsigned char*>(a) + 16 * lane, true);
  if (lane < 16) async_copy_16(y + 16 * lane, reinterpret_cast<const unsigned char*>(b) + 16 * lane, true);
  async_commit();
  async_wait<0>();  // wait of product_kernel
  __syncthreads();  // barrier of product_kernel
  uint32_t left[1][4], right[4], fragment[1][2];
  warp_load_matrices(left[0], x + (lane % 16) * 32 + lane / 16 * 16);
  warp_load_matrices(right, y + (lane % 8) * 32 + lane / 8 % 2 * 16);
  fragment[0][0] = right[0];
  fragment[0][1] = right[1];
  float c[1][1][4] = {};
  warp_multiply<T>(c, left, fragment);
  for (int r = 0; r < 4; ++r) out[(lane / 4 + 8 * (r / 2)) * 8 + 2 * (lane % 4) + r % 2] = c[0][0][r];
}

// out (16, 16) <- in^T, one warp, by transposed loads of 8x8 matrices.
SK_KERNEL(32, 1) transpose_kernel(const Half* in, Half* out) {
  Half* x = reinterpret_cast<Half*>(shared_memory());
  const int lane = threadIdx.x;
  for (int k = lane; k < 256; k += 32) x[k] = in[k];
  __syncthreads();  // barrier of transpose_kernel
  uint32_t r[4];
  warp_load_matrices_transposed(r, x + (lane % 8 + 8 * (lane / 16)) * 16 + 8 * (lane / 8 % 2));
  for (int m = 0; m < 4; ++m) {
    Half pair[2];
    memcpy(pair, &r[m], 4);
    const int row = lane / 4 + 8 * (m % 2), column = 2 * (lane % 4) + 8 * (m / 2);
    out[row * 16 + column] = pair[0];
    out[row * 16 + column + 1] = pair[1];
  }
}

SK_KERNEL(32, 1) past_the_end_kernel(int bytes) { shared_memory()[bytes + threadIdx.x] = 1; }
SK_KERNEL(64, 1) divergent_kernel() {
  if (threadIdx.x < 32) __syncwarp();
  if (threadIdx.x == 40) return;
  if (threadIdx.x >= 32) __shfl_sync(0xffffffffu, 1, 0);
}
SK_KERNEL(32, 1) unwaited_kernel(const float* in) {
  async_copy_16(shared_memory() + 16 * threadIdx.x, in, true);
  async_commit();
}

std::string message;

}  // namespace

extern "C" {

// Runs the kernel of that name; null, or what the emulator had against it.
const char* sk_selftest(const char* kernel, const void* a, const void* b, void* out, int n) {
  const std::string name = kernel;
  auto f = static_cast<float*>(out);
  try {
    std::function<void()> body;
    if (name == "sum")
      sk_emulator::run(dim3(n), 64, 8, [&] { sum_kernel(static_cast<const float*>(a), f); });
    else if (name == "bfloat16")
      sk_emulator::run(
          1, 32, 768, [&] { product_kernel(static_cast<const BFloat16*>(a), static_cast<const BFloat16*>(b), f); });
    else if (name == "float16")
      sk_emulator::run(
          1, 32, 768, [&] { product_kernel(static_cast<const Half*>(a), static_cast<const Half*>(b), f); });
    else if (name == "float32")
      sk_emulator::run(
          1, 32, 768, [&] { product_kernel(static_cast<const float*>(a), static_cast<const float*>(b), f); });
    else if (name == "transpose")
      sk_emulator::run(1, 32, 512, [&] { transpose_kernel(static_cast<const Half*>(a), static_cast<Half*>(out)); });
    else if (name == "past the end")
      sk_emulator::run(1, 32, n, [&] { past_the_end_kernel(n); });
    else if (name == "divergent")
      sk_emulator::run(1, 64, 0, [&] { divergent_kernel(); });
    else if (name == "unwaited")
      sk_emulator::run(1, 32, 512, [&] { unwaited_kernel(static_cast<const float*>(a)); });
    else
      return "no such kernel";
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
}
