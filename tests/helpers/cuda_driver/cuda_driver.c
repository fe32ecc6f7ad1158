// A stand-in for libcuda.so.1: two devices, sm_75 and sm_90, that record launches and run nothing.
//
// It refuses what a driver refuses: a grid, block or shared memory beyond the card's limits, attributes that the card
// lacks, a launch in another context than the function's. Of a function's parameters, whose sizes a driver reads from the machine code,
// `stand_in_parameters` tells it, from the PTX.

#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { DEVICES = 2, PARAMETERS = 96, LAUNCHES = 4096 };

typedef struct {
  int major, minor, shared, shared_of_sm;
} Limits;
static const Limits limits[DEVICES] = {{7, 5, 65536, 65536}, {9, 0, 232448, 233472}};

typedef struct {
  int device, shared, count;
  int sizes[PARAMETERS];
} Function;

typedef struct {
  uint64_t function, stream;
  int32_t device;
  uint32_t grid[3], block[3], shared, count;
  uint64_t values[PARAMETERS];
} Launch;

static Launch launches[LAUNCHES];
static int launched;
static int contexts[DEVICES];
static CUcontext current;

static CUcontext context_of(int device) { return (CUcontext)&contexts[device]; }
static int device_of(CUcontext context) { return (int)((int *)context - contexts); }

const Launch *stand_in_launches(void) { return launches; }
int stand_in_count(void) { return launched; }
int stand_in_size(void) { return (int)sizeof(Launch); }
void stand_in_parameters(uint64_t function, int count, const int *sizes) {
  Function *f = (Function *)function;
  f->count = count;
  memcpy(f->sizes, sizes, count * sizeof(int));
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = DEVICES, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) {
  if (number < 0 || number >= DEVICES) return CUDA_ERROR_INVALID_DEVICE;
  return *device = number, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  const Limits *of = &limits[device];
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = of->major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = of->minor; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = of->shared; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = of->shared_of_sm; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 64;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = context_of(device), CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) {
  return current ? (*device = device_of(current), CUDA_SUCCESS) : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  return *module = (CUmodule)current, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Function *f = calloc(1, sizeof(Function));
  f->device = device_of((CUcontext)module);
  f->shared = 49152;
  f->count = -1;
  return *function = (CUfunction)f, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Function *f = (Function *)function;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  if (value > limits[f->device].shared) return CUDA_ERROR_INVALID_VALUE;
  return f->shared = value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  Function *f = (Function *)function;
  if (!current || device_of(current) != f->device) return CUDA_ERROR_INVALID_CONTEXT;
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ) return CUDA_ERROR_INVALID_VALUE;
  if (config->gridDimX > 2147483647u || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  if (!config->blockDimX || !config->blockDimY || !config->blockDimZ) return CUDA_ERROR_INVALID_VALUE;
  if (config->blockDimX * config->blockDimY * config->blockDimZ > 1024) return CUDA_ERROR_INVALID_VALUE;
  if (config->sharedMemBytes > (unsigned)f->shared) return CUDA_ERROR_INVALID_VALUE;
  if (config->numAttrs && limits[f->device].major < 9) return CUDA_ERROR_INVALID_VALUE;
  if (f->count < 0 || launched == LAUNCHES) return CUDA_ERROR_NOT_INITIALIZED;
  Launch *launch = &launches[launched++];
  launch->function = (uint64_t)function;
  launch->stream = (uint64_t)config->hStream;
  launch->device = f->device;
  memcpy(launch->grid, (unsigned[]){config->gridDimX, config->gridDimY, config->gridDimZ}, 12);
  memcpy(launch->block, (unsigned[]){config->blockDimX, config->blockDimY, config->blockDimZ}, 12);
  launch->shared = config->sharedMemBytes;
  launch->count = f->count;
  for (int i = 0; i < f->count; i++) memcpy(&launch->values[i], params[i], f->sizes[i]);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}

// Triton asks from 3.9 on.
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_CONTEXT ? "another context" : error == CUDA_ERROR_INVALID_VALUE ? "a value beyond a limit" : "error";
  return CUDA_SUCCESS;
}
