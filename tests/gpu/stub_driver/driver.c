// The part of the CUDA driver that Triton and csrc/launch use, without a device: `stub_driver.py` loads it as
// libcuda.so.1. Loading a kernel, making a tensor map and launching a kernel call functions in Python, which check the
// arguments and return what the driver would return; all other functions return success. Nothing is launched.

#include <cuda.h>
#include <string.h>

// Set from Python. If they are null, every call succeeds, which measures the time of Triton itself.
int (*stub_load)(const void* image);  // the number of the kernel in the image, negative: refused
int (*stub_attribute)(int kernel, int attribute);
int (*stub_set_attribute)(int kernel, int attribute, int value);
int (*stub_encode)(
    CUtensorMap* map,
    int type,
    int rank,
    CUdeviceptr address,
    const cuuint64_t* dims,
    const cuuint64_t* strides,
    const cuuint32_t* box,
    const cuuint32_t* steps,
    int interleave,
    int swizzle,
    int fill);
int (*stub_launch)(const CUlaunchConfig* config, int kernel, void** parameters);

// The attributes of an H100, other ones are 0. The table ends with 0, which is not an attribute.
static const int kDevice[][2] = {
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
    {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 2619000},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120},
    {0, 0}};

// Handles are small numbers, never null.
static int number(const void* handle) { return (int)((size_t)handle - 1); }

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  static const char* const kTexts[] = {"no error", "invalid argument"};
  *text = error == CUDA_SUCCESS || error == CUDA_ERROR_INVALID_VALUE ? kTexts[error] : "refused by the stub";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  for (int i = 0; kDevice[i][0] != 0; ++i) {
    if (kDevice[i][0] == (int)attribute) {
      *value = kDevice[i][1];
      return CUDA_SUCCESS;
    }
  }
  *value = 0;
  return CUDA_SUCCESS;
}

// Contexts belong to threads, and autograd's have none at first.
static _Thread_local CUcontext current;

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (current == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  int kernel = stub_load == NULL ? 0 : stub_load(image);
  *module = (CUmodule)(size_t)(kernel + 1);
  return kernel < 0 ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = stub_attribute == NULL ? 1024 : stub_attribute(number(function), attribute);
  return *value < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (stub_set_attribute != NULL) return stub_set_attribute(number(function), attribute, value);
  return attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  memcpy(value, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map,
    CUtensorMapDataType type,
    cuuint32_t rank,
    void* address,
    const cuuint64_t* dims,
    const cuuint64_t* strides,
    const cuuint32_t* box,
    const cuuint32_t* steps,
    CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof(*map));
  if (stub_encode == NULL) return CUDA_SUCCESS;
  return stub_encode(map, type, rank, (CUdeviceptr)address, dims, strides, box, steps, interleave, swizzle, fill);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (current == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  return stub_launch == NULL ? CUDA_SUCCESS : stub_launch(config, number(function), parameters);
}

CUresult cuLaunchKernel(
    CUfunction function,
    unsigned grid_x,
    unsigned grid_y,
    unsigned grid_z,
    unsigned block_x,
    unsigned block_y,
    unsigned block_z,
    unsigned shared,
    CUstream stream,
    void** parameters,
    void** extra) {
  CUlaunchConfig config = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

// What Triton's module is linked with, and the package has no use for.
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* which, void** values, CUdeviceptr pointer) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
