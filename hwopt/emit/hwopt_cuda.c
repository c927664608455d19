/* hwopt's runtime for models on NVIDIA GPUs. C11, pthreads and libcuda, the driver's own library; neither CUDA's toolkit nor its
 * runtime. One run at a time: they share the memory on the GPU. */
#define _POSIX_C_SOURCE 200809L
#include "hwopt_types.h"
#include "hwopt_cuda.h"

#include <pthread.h>
#include <stdlib.h>

/* CUDA driver API, as cuda.h declares it (stable since CUDA 4.0): no toolkit is needed to compile this. */
typedef int CUresult; /* 0: success */
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef unsigned long long CUdeviceptr;
CUresult cuInit(unsigned int flags);
CUresult cuDeviceGet(CUdevice *device, int ordinal);
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device);
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device);
CUresult cuCtxPushCurrent_v2(CUcontext context);
CUresult cuCtxPopCurrent_v2(CUcontext *context);
CUresult cuModuleLoadData(CUmodule *module, const void *image);
CUresult cuModuleUnload(CUmodule module);
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name);
CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes);
CUresult cuMemFree_v2(CUdeviceptr pointer);
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes);
CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes);
CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,
                        unsigned int block_y, unsigned int block_z, unsigned int shared_bytes, CUstream stream, void **parameters,
                        void **extra);

struct hwopt_gpu {
  CUdevice device;
  CUcontext context;
  CUmodule module;
  CUdeviceptr memory;
  CUdeviceptr *arguments; /* of one launch */
  void **parameters;      /* and where each of them lies */
  CUfunction functions[];
};

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

static void gpu_close(hwopt_gpu *gpu) {
  CUcontext left;
  if (gpu->context && !cuCtxPushCurrent_v2(gpu->context)) {
    if (gpu->memory) (void)cuMemFree_v2(gpu->memory);
    if (gpu->module) (void)cuModuleUnload(gpu->module);
    (void)cuCtxPopCurrent_v2(&left);
  }
  if (gpu->context) (void)cuDevicePrimaryCtxRelease_v2(gpu->device);
  free(gpu->arguments), free(gpu->parameters), free(gpu);
}

/* Weights and kernels onto the first GPU, whose context is current then. */
static int gpu_load(const hwopt_cuda_model *m, hwopt_gpu *gpu) {
  if (cuModuleLoadData(&gpu->module, m->cubin)) return HWOPT_ERROR_DEVICE;
  for (uint32_t i = 0; i < m->launches_count; ++i)
    if (cuModuleGetFunction(&gpu->functions[i], gpu->module, m->launches[i].kernel)) return HWOPT_ERROR_DEVICE;
  if (cuMemAlloc_v2(&gpu->memory, (size_t)m->bytes)) return HWOPT_ERROR_MEMORY;
  if (m->weights_bytes && cuMemcpyHtoD_v2(gpu->memory, m->weights, (size_t)m->weights_bytes)) return HWOPT_ERROR_DEVICE;
  return HWOPT_OK;
}

static int gpu_open(const hwopt_cuda_model *m, hwopt_gpu **found) {
  hwopt_gpu *gpu = calloc(1, sizeof *gpu + m->launches_count * sizeof gpu->functions[0]);
  CUcontext left;
  int code = HWOPT_ERROR_DEVICE;
  if (!gpu) return HWOPT_ERROR_MEMORY;
  gpu->arguments = calloc(m->arguments_most + 1u, sizeof *gpu->arguments);
  gpu->parameters = calloc(m->arguments_most + 1u, sizeof *gpu->parameters);
  if (!gpu->arguments || !gpu->parameters) code = HWOPT_ERROR_MEMORY;
  else if (!cuInit(0) && !cuDeviceGet(&gpu->device, 0) && !cuDevicePrimaryCtxRetain(&gpu->context, gpu->device) &&
           !cuCtxPushCurrent_v2(gpu->context)) {
    code = gpu_load(m, gpu);
    (void)cuCtxPopCurrent_v2(&left);
  }
  if (code == HWOPT_OK) *found = gpu;
  else gpu_close(gpu);
  return code;
}

static int gpu_run(const hwopt_cuda_model *m, hwopt_gpu *gpu, const void *const *inputs, void *const *outputs) {
  for (uint32_t i = 0; i < m->info->inputs_count; ++i)
    if (cuMemcpyHtoD_v2(gpu->memory + m->inputs[i], inputs[i], (size_t)m->info->inputs[i].bytes)) return HWOPT_ERROR_DEVICE;
  for (uint32_t i = 0; i < m->launches_count; ++i) {
    const hwopt_launch *l = &m->launches[i];
    for (uint32_t k = 0; k < l->count; ++k) {
      gpu->arguments[k] = gpu->memory + m->arguments[l->first + k];
      gpu->parameters[k] = &gpu->arguments[k];
    }
    if (cuLaunchKernel(gpu->functions[i], l->grid[0], l->grid[1], l->grid[2], l->block[0], l->block[1], l->block[2], 0, NULL,
                       gpu->parameters, NULL))
      return HWOPT_ERROR_KERNEL;
  }
  for (uint32_t i = 0; i < m->info->outputs_count; ++i) /* waits for the kernels, and tells if one of them failed */
    if (cuMemcpyDtoH_v2(outputs[i], gpu->memory + m->outputs[i], (size_t)m->info->outputs[i].bytes)) return HWOPT_ERROR_DEVICE;
  return HWOPT_OK;
}

int hwopt_cuda_run(const hwopt_cuda_model *m, const void *const *inputs, void *const *outputs) {
  CUcontext left;
  int code = HWOPT_OK;
  for (uint32_t i = 0; i < m->info->inputs_count; ++i)
    if (!inputs[i]) return HWOPT_ERROR_NULL;
  for (uint32_t i = 0; i < m->info->outputs_count; ++i)
    if (!outputs[i]) return HWOPT_ERROR_NULL;
  pthread_mutex_lock(&turn);
  if (!*m->gpu) code = gpu_open(m, m->gpu);
  if (code == HWOPT_OK && cuCtxPushCurrent_v2((*m->gpu)->context)) code = HWOPT_ERROR_DEVICE;
  else if (code == HWOPT_OK) {
    code = gpu_run(m, *m->gpu, inputs, outputs);
    (void)cuCtxPopCurrent_v2(&left);
  }
  pthread_mutex_unlock(&turn);
  return code;
}

void hwopt_cuda_release(const hwopt_cuda_model *m) {
  pthread_mutex_lock(&turn);
  if (*m->gpu) gpu_close(*m->gpu);
  *m->gpu = NULL;
  pthread_mutex_unlock(&turn);
}

const char *hwopt_cuda_error_text(int code) {
  switch (code) {
    case HWOPT_OK: return "no error";
    case HWOPT_ERROR_NULL: return "an input or output pointer is NULL";
    case HWOPT_ERROR_MEMORY: return "out of memory";
    case HWOPT_ERROR_KERNEL: return "a kernel cannot be launched";
    case HWOPT_ERROR_DEVICE: return "no GPU, or none that the kernels are for, or it failed";
    default: return "unknown error code";
  }
}
