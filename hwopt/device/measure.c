/* Timing on a device: linked with a batch of candidates into the library that is uploaded. Only __tvm_ffi_hwopt_* are visible, so
 * that TVM does not put its own thread pool into the slots of the runtime that ships. */
#include "timing.c"

#define INTEGER 1
#define FLOATING 3
#define FIXED 5

extern const hwopt_kernel hwopt_kernels[]; /* generated */
extern const int32_t hwopt_kernels_count;
int __tvm_ffi_hwopt_device_time(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result);

static void give(TVMFFIAny *result, double seconds) {
  result->type_index = FLOATING;
  memcpy(&result->value, &seconds, sizeof seconds);
}

static uint64_t bytes_of(const DLTensor *tensor) {
  uint64_t bytes = tensor->dtype.bits / 8u * (uint64_t)tensor->dtype.lanes;
  for (int32_t i = 0; i < tensor->ndim; ++i) bytes *= (uint64_t)tensor->shape[i];
  return bytes;
}

/* `sets` lists of arguments in turn; from the second on with weights of their own, which are then as cold as a model's. */
static TVMFFIAny *argument_sets(const TVMFFIAny *tensors, int32_t count, int32_t sets, int32_t weights) {
  TVMFFIAny *made = calloc((size_t)sets * (size_t)count, sizeof *made);
  DLTensor *copies = calloc((size_t)sets, sizeof *copies);
  if (!made || !copies) return NULL;
  for (int32_t set = 0; set < sets; ++set) {
    memcpy(made + (size_t)set * (size_t)count, tensors, (size_t)count * sizeof *made);
    if (!set || weights < 0) continue;
    const DLTensor *original = tensors[weights].value.v_ptr;
    copies[set] = *original;
    copies[set].data = aligned_alloc(ALIGNMENT, rounded(bytes_of(original)));
    if (!copies[set].data) return NULL;
    memcpy(copies[set].data, (const char *)original->data + original->byte_offset, bytes_of(original));
    copies[set].byte_offset = 0;
    made[(size_t)set * (size_t)count + (size_t)weights].value.v_ptr = &copies[set];
  }
  return made;
}

/* (kernel, threads, times, sets, place of the weights or -1, tensors...) -> seconds of one run; negative if it failed.
 * The tensors are the same in every call of a session: the copies of the first one are kept. */
int __tvm_ffi_hwopt_device_time(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result) {
  static TVMFFIAny *kept;
  static DLTensor own[64];
  (void)self;
  give(result, -2);
  if (count <= FIXED || count - FIXED > 64) return 0;
  for (int32_t i = 0; i < count; ++i)
    if (given[i].type_index != (i < FIXED ? INTEGER : DLTENSOR_POINTER)) return 0;
  int64_t kernel = given[0].value.v_int64, sets = given[3].value.v_int64, weights = given[4].value.v_int64;
  if (kernel < 0 || kernel >= hwopt_kernels_count || sets < 1 || weights >= count - FIXED) return 0;
  if (!kept) {
    TVMFFIAny tensors[64] = {{0}};
    for (int32_t i = FIXED; i < count; ++i) { /* what is passed lives as long as the call; the data live as long as the session */
      own[i - FIXED] = *(const DLTensor *)given[i].value.v_ptr;
      int64_t *shape = calloc((size_t)own[i - FIXED].ndim + 1, sizeof *shape);
      if (!shape) return 0;
      memcpy(shape, own[i - FIXED].shape, (size_t)own[i - FIXED].ndim * sizeof *shape);
      own[i - FIXED].shape = shape;
      own[i - FIXED].strides = NULL;
      tensors[i - FIXED].type_index = DLTENSOR_POINTER;
      tensors[i - FIXED].value.v_ptr = &own[i - FIXED];
    }
    kept = argument_sets(tensors, count - FIXED, (int32_t)sets, (int32_t)weights);
  }
  if (!kept) return 0;
  give(result, hwopt_time(hwopt_kernels[kernel], kept, count - FIXED, (int32_t)sets, (int32_t)given[1].value.v_int64,
                          (int32_t)given[2].value.v_int64));
  return 0;
}
