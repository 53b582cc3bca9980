#include "launch/driver.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace selfsup_kernels::launch {

namespace {

std::atomic<bool> forked{false};

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("selfsup_kernels: " + message);
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  require(function, std::string("the CUDA driver has no ") + name);
}

}  // namespace

Driver Driver::load() {
  void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
  require(library, "the CUDA driver, libcuda.so.1, does not load");
  Driver driver;
  find(library, "cuLaunchKernel", driver.launch_kernel);
  find(library, "cuTensorMapEncodeTiled", driver.encode_map);
  find(library, "cuModuleLoadData", driver.module_load);
  find(library, "cuModuleGetFunction", driver.module_function);
  find(library, "cuFuncSetAttribute", driver.set_attribute);
  find(library, "cuFuncSetCacheConfig", driver.prefer_cache);
  find(library, "cuCtxGetCurrent", driver.context_get);
  find(library, "cuCtxSetCurrent", driver.context_set);
  find(library, "cuDevicePrimaryCtxRetain", driver.context_retain);
  find(library, "cuDeviceGet", driver.device_get);
  find(library, "cuGetErrorString", driver.error_text);
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return driver;
}

const Driver& Driver::get() {
  static const Driver driver = load();
  require(
      !forked,
      "this process was forked from one that used CUDA, which cannot be used in it; start processes with"
      " multiprocessing's 'spawn'");
  return driver;
}

void Driver::ensure_context(int device) const {
  void* context = nullptr;
  check(context_get(&context), "cuCtxGetCurrent");
  if (context) return;
  int handle = 0;
  check(device_get(&handle, device), "cuDeviceGet");
  check(context_retain(&context, handle), "cuDevicePrimaryCtxRetain");
  check(context_set(context), "cuCtxSetCurrent");
}

void Driver::check(Status status, const char* what) const {
  if (status == 0) return;
  const char* text = nullptr;
  error_text(status, &text);
  require(false, std::string(what) + ": the CUDA driver says: " + (text ? text : "unknown error"));
}

void* current_stream(int device) {
  // In the library that only a PyTorch with CUDA has, so the extension does not link to it.
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void* stream = nullptr;
  require(get && get(device, &stream) == 0, "PyTorch has no current CUDA stream");
  return stream;
}

}  // namespace selfsup_kernels::launch
