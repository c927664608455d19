#ifndef HWOPT_TYPES_H
#define HWOPT_TYPES_H
/* What every model that hwopt compiled has in common: error codes and the description of its tensors. */
#include <stddef.h>
#include <stdint.h>

#define HWOPT_OK 0
#define HWOPT_ERROR_NULL (-1)      /* an input or output pointer is NULL */
#define HWOPT_ERROR_ALIGNMENT (-2) /* workspace not on a 64-byte boundary, or (built without a heap) a tensor that is not */
#define HWOPT_ERROR_MEMORY (-3)    /* out of memory, or no workspace given to a library built without a heap */
#define HWOPT_ERROR_CPU (-4)       /* this processor lacks an instruction set that the kernels need */
#define HWOPT_ERROR_KERNEL (-5)    /* a kernel failed (its scratch memory could not be had) */
#define HWOPT_ERROR_OVERLAP (-6)   /* an output overlaps an input, another output or the workspace */
#define HWOPT_ERROR_ARGUMENT (-7)  /* a number out of its range */
#define HWOPT_ERROR_DEVICE (-8)    /* no GPU, or none that the kernels are for, or it failed */

typedef struct {
  const char *name;     /* as in the model */
  const char *dtype;    /* float32, int8, ... */
  const int64_t *shape; /* `rank` dimensions, C order */
  int32_t rank;
  uint64_t bytes;
} hwopt_tensor_info;

typedef struct {
  const char *name;
  const char *features; /* what the processor must have in any case, in /proc/cpuinfo's words, blank separated */
  uint32_t inputs_count;
  uint32_t outputs_count;
  const hwopt_tensor_info *inputs;
  const hwopt_tensor_info *outputs;
  uint64_t arena_bytes;     /* activations */
  uint64_t workspace_bytes; /* activations, kernel scratch and tables: what the caller provides */
  uint64_t weight_bytes;
  uint32_t variants_count;     /* sets of kernels in the library; the first that the processor has the features for is run */
  const char *const *variants; /* the features that each of them needs */
} hwopt_info;
#endif
