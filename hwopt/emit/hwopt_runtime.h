/* The tiny runtime behind a generated model: runs its table of calls, lends scratch memory, runs parallel loops. */
#ifndef HWOPT_RUNTIME_H
#define HWOPT_RUNTIME_H
#ifndef HWOPT_TYPES_H
#error "include the model's header first"
#endif
#include <stdatomic.h>

/* The binary interface of TVM's kernels: DLPack tensors in tvm-ffi 0.1 argument slots. */
typedef struct {
  int32_t device_type, device_id;
} DLDevice;
typedef struct {
  uint8_t code, bits;
  uint16_t lanes;
} DLDataType;
typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides;
  uint64_t byte_offset;
} DLTensor;
typedef struct {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t v_int64;
    void *v_ptr;
  } value;
} TVMFFIAny;
typedef int (*hwopt_kernel)(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result);

enum { HWOPT_ARENA, HWOPT_WEIGHTS, HWOPT_INPUT, HWOPT_OUTPUT };

typedef struct {
  uint64_t offset; /* bytes into the arena or the weights; the index of the input or output */
  uint32_t shape;  /* index of the first dimension in the model's `dims` */
  uint8_t place, code, bits, rank;
} hwopt_slot;

typedef struct {
  hwopt_kernel kernel;
  uint32_t first, count; /* in the model's `arguments`, which number slots */
} hwopt_call;

typedef struct { /* what no kernel writes: outputs that are inputs, constants or other outputs */
  uint64_t offset, bytes;
  uint32_t output;
  uint8_t place;
} hwopt_copy;

typedef struct hwopt_pool hwopt_pool;

typedef struct {
  const hwopt_info *info;
  const unsigned char *weights;
  const int64_t *dims;
  const hwopt_slot *slots;
  const uint32_t *arguments;
  const hwopt_call *calls;
  const hwopt_copy *copies;
  uint32_t slots_count, arguments_most, calls_count, copies_count;
  uint64_t scratch_bytes; /* kernels' temporaries, as the compiler foresaw them */
  int (*supported)(void);
  atomic_int *threads;
  atomic_int *cpu; /* 0 not asked yet, 1 good, -1 lacking */
  _Atomic(hwopt_pool *) *idle;
} hwopt_model;

/* The first of several variants of a model that this processor can run; the last one where there is none. */
const hwopt_model *hwopt_choose(const hwopt_model *models, uint32_t count);
int hwopt_run(const hwopt_model *model, const void *const *inputs, void *const *outputs, void *workspace);
int hwopt_set_threads(const hwopt_model *model, int threads);
void hwopt_release(const hwopt_model *model);
const char *hwopt_error_text(int code);
#endif
