/* Times a model's kernels where they stand, and the driver around them: compiled together with the sources of one model, whose
 * tables and runtime these are. Tensors are the model's inputs, then its outputs: HWOPT_STAMPED_TENSORS. HWOPT_STAMPED names the
 * model's C file, HWOPT_STAMPED_RUN(data, workspace) calls its run. Only __tvm_ffi_hwopt_* are visible, see device/measure.c. */
#include HWOPT_STAMPED
#include "hwopt_runtime.c"

#include <time.h>

#define STAMP_FIXED 2 /* how often, threads; then the tensors */
#define STAMP_TENSORS HWOPT_STAMPED_TENSORS
#define STAMP_OBJECT 24 /* sizeof(TVMFFIObject), in front of the tensor of a kTVMFFITensor */
#define STAMP_FUNCTION(name)                                                                          \
  int __tvm_ffi_hwopt_stamp_##name(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result); \
  int __tvm_ffi_hwopt_stamp_##name(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result)

typedef struct {
  const hwopt_model *model;
  unsigned char *workspace;
  DLTensor *tensors;
  TVMFFIAny *arguments; /* of all calls, one after the other */
  hwopt_pool pool;
  context mine;
} stamps;

static double stamp_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int stamp_result(TVMFFIAny *result, double seconds) {
  result->type_index = 3; /* kTVMFFIFloat */
  memcpy(&result->value, &seconds, sizeof seconds);
  return 0;
}

static void *stamp_data(const TVMFFIAny *given, int tensor) {
  const TVMFFIAny *one = &given[STAMP_FIXED + tensor];
  size_t head = one->type_index == DLTENSOR_POINTER ? 0 : STAMP_OBJECT;
  const DLTensor *found = (const void *)((const char *)one->value.v_ptr + head);
  return (char *)found->data + found->byte_offset;
}

/* The model as the driver would run it, with everything that the driver does before and between its calls done. */
static int stamp_open(stamps *s, const TVMFFIAny *given) {
  view views[STAMP_TENSORS];
  size_t total = 0, at = 0;
  s->model = hwopt_choose(models, sizeof models / sizeof *models);
  const hwopt_model *m = s->model;
  for (uint32_t i = 0; i < m->calls_count; ++i) total += m->calls[i].count;
  s->workspace = aligned_alloc(ALIGNMENT, rounded(m->info->workspace_bytes + 1));
  s->tensors = calloc(m->slots_count + 1u, sizeof *s->tensors);
  s->arguments = calloc(total + 1, sizeof *s->arguments);
  if (!s->workspace || !s->tensors || !s->arguments || !cpu_good(m)) return -1;
  for (int i = 0; i < STAMP_TENSORS; ++i) views[i] = stamp_data(given, i);
  for (uint32_t i = 0; i < m->slots_count; ++i) {
    const hwopt_slot *slot = &m->slots[i];
    s->tensors[i] = (DLTensor){resolve(m, slot->place, slot->offset, s->workspace, views), {DEVICE_CPU, 0}, slot->rank,
                               {slot->code, slot->bits, 1}, (int64_t *)(uintptr_t)(m->dims + slot->shape), NULL, 0};
  }
  for (uint32_t i = 0; i < m->calls_count; ++i)
    for (uint32_t k = 0; k < m->calls[i].count; ++k)
      s->arguments[at++] = (TVMFFIAny){DLTENSOR_POINTER, 0, {.v_ptr = &s->tensors[m->arguments[m->calls[i].first + k]]}};
  unsigned char *scratch = s->workspace + rounded(m->info->arena_bytes) + table_bytes(m);
  s->mine = (context){&s->pool, scratch, scratch, scratch + m->scratch_bytes, (int)given[1].value.v_int64};
  return 0;
}

static void stamp_close(stamps *s) {
  pool_clear(&s->pool);
  free(s->workspace), free(s->tensors), free(s->arguments);
}

/* Every kernel once, in order; with `seconds`, what each takes. */
static int stamp_pass(stamps *s, double *seconds) {
  const hwopt_model *m = s->model;
  const TVMFFIAny *arguments = s->arguments;
  TVMFFIAny result;
  for (uint32_t i = 0; i < m->calls_count; arguments += m->calls[i++].count) {
    double began = seconds ? stamp_now() : 0;
    if (m->calls[i].kernel(NULL, arguments, (int32_t)m->calls[i].count, &result)) return -1;
    if (seconds) seconds[i] = stamp_now() - began;
  }
  return 0;
}

/* Seconds of 20000 products that wait for each other: what the clock does, whatever others do to the caches. */
static double stamp_clock(void) {
  volatile uint64_t seed = 3;
  uint64_t value = seed;
  double began = stamp_now();
  for (int i = 0; i < 20000; ++i) value = value * value + 1;
  seed = value;
  return stamp_now() - began;
}

/* (times, threads, tensors...) -> seconds of one run of the model; the error code of a run that failed, less 100. */
STAMP_FUNCTION(run) {
  void *data[STAMP_TENSORS], *workspace;
  int code = 0;
  (void)self;
  if (count != STAMP_FIXED + STAMP_TENSORS) return -1;
  for (int i = 0; i < STAMP_TENSORS; ++i) data[i] = stamp_data(given, i);
  hwopt_set_threads(models, (int)given[1].value.v_int64);
  workspace = aligned_alloc(ALIGNMENT, rounded(info.workspace_bytes + 1));
  code = HWOPT_STAMPED_RUN(data, workspace); /* the system gives memory when it is first written */
  double began = stamp_now();
  for (int64_t i = 0; i < given[0].value.v_int64 && !code; ++i) code = HWOPT_STAMPED_RUN(data, workspace);
  double seconds = (stamp_now() - began) / (double)given[0].value.v_int64;
  free(workspace);
  return stamp_result(result, code ? code - 100 : seconds);
}

/* (times, threads, tensors...) -> seconds of the kernels of one run, called from a bare loop; -1 if one failed. */
STAMP_FUNCTION(kernels) {
  stamps s = {0};
  (void)self;
  if (count != STAMP_FIXED + STAMP_TENSORS) return -1;
  int failed = stamp_open(&s, given);
  current = &s.mine;
  failed = failed || stamp_pass(&s, NULL);
  double began = stamp_now();
  for (int64_t i = 0; i < given[0].value.v_int64 && !failed; ++i) failed = stamp_pass(&s, NULL);
  double seconds = (stamp_now() - began) / (double)given[0].value.v_int64;
  current = NULL;
  stamp_close(&s);
  return stamp_result(result, failed ? -1 : seconds);
}

/* (passes, threads, tensors..., float64[passes, calls + 1]) -> 0, or -1 if a kernel failed. Every row holds the seconds of the
 * calls of one pass, then those of the clock's reference beside it. */
STAMP_FUNCTION(calls) {
  stamps s = {0};
  (void)self;
  if (count != STAMP_FIXED + STAMP_TENSORS + 1) return -1;
  double *row = stamp_data(given, STAMP_TENSORS);
  int failed = stamp_open(&s, given);
  for (int64_t i = 0; i < given[0].value.v_int64 && !failed; ++i, row += s.model->calls_count + 1) {
    current = &s.mine;
    failed = stamp_pass(&s, NULL) || stamp_pass(&s, row); /* the caches hold what the reference left */
    current = NULL;
    row[s.model->calls_count] = stamp_clock();
  }
  stamp_close(&s);
  return stamp_result(result, failed ? -1 : 0);
}
