// The functions of the CUDA driver that launches need, found in libcuda.so.1 at run time: the extension is built and
// loaded without CUDA.
#pragma once

#include <cstdint>

namespace selfsup_kernels::launch {

constexpr int map_bytes = 128;  // of a CUtensorMap, which is aligned to 64 bytes

struct Driver {
  using Status = int;  // CUresult; 0 is success

  Status (*launch_kernel)(
      void* function,
      unsigned grid_x,
      unsigned grid_y,
      unsigned grid_z,
      unsigned block_x,
      unsigned block_y,
      unsigned block_z,
      unsigned shared_bytes,
      void* stream,
      void** parameters,
      void** extra);
  Status (*encode_map)(
      void* map,
      int type,
      uint32_t rank,
      void* address,
      const uint64_t* sizes,
      const uint64_t* strides,
      const uint32_t* box,
      const uint32_t* steps,
      int interleave,
      int swizzle,
      int promotion,
      int fill);

  Status (*module_load)(void** module, const void* image);
  Status (*module_function)(void** function, void* module, const char* name);
  Status (*set_attribute)(void* function, int attribute, int value);
  Status (*prefer_cache)(void* function, int preference);

  // Loads the library in the first call. Raises if there is none, or if this process was forked from one that used it.
  static const Driver& get();

  // Makes the primary context of the device current if this thread has none: threads of autograd start without one.
  void ensure_context(int device) const;

  // Raises with the driver's own text unless `status` is a success.
  void check(Status status, const char* what) const;

 private:
  Status (*context_get)(void** context);
  Status (*context_set)(void* context);
  Status (*context_retain)(void** context, int device);
  Status (*device_get)(int* device, int ordinal);
  Status (*error_text)(Status status, const char** text);

  static Driver load();
};

// The current CUDA stream of PyTorch on a device.
void* current_stream(int device);

}  // namespace selfsup_kernels::launch
