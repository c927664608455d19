/* The runtime of models for NVIDIA GPUs, through CUDA's driver API: loads a cubin, keeps weights and activations on the GPU, and
 * launches the kernels of one run after the other. */
#ifndef HWOPT_CUDA_H
#define HWOPT_CUDA_H
#ifndef HWOPT_TYPES_H
#error "include the model's header first"
#endif

typedef struct {
  const char *kernel;
  uint32_t grid[3], block[3];
  uint32_t first, count; /* in the model's `arguments`, which are offsets into its memory on the GPU */
} hwopt_launch;

typedef struct hwopt_gpu hwopt_gpu;

typedef struct {
  const hwopt_info *info;
  const unsigned char *weights, *cubin;
  const hwopt_launch *launches;
  const uint64_t *arguments, *inputs, *outputs; /* offsets; weights lie at 0 */
  uint32_t launches_count, arguments_most;
  uint64_t weights_bytes, bytes; /* of all memory on the GPU */
  hwopt_gpu **gpu;               /* what a run left for the next one */
} hwopt_cuda_model;

int hwopt_cuda_run(const hwopt_cuda_model *model, const void *const *inputs, void *const *outputs);
void hwopt_cuda_release(const hwopt_cuda_model *model);
const char *hwopt_cuda_error_text(int code);
#endif
