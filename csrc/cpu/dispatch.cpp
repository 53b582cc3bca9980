// Chooses the kernel table once, at first use.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace selfsup_kernels {

namespace {

const KernelTable& choose() {
  const char* asked = std::getenv("SELFSUP_KERNELS_CPU_CAPABILITY");
  auto wants = [asked](const char* name) { return asked == nullptr || std::strcmp(asked, name) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wants("avx512")) return kernels_avx512;
  if (avx2 && wants("avx2")) return kernels_avx2;
#endif
  (void)wants;
  return kernels_default;
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace selfsup_kernels
