/* Times kernels in the runtime that ships: linked with the kernels of a batch of candidates. */
#include "hwopt_runtime.c"

#include <time.h>

/* Seconds of one of `times` runs, each with the next of `sets` lists of `count` arguments; -1 if the kernel fails. */
double hwopt_time(hwopt_kernel kernel, const TVMFFIAny *arguments, int32_t count, int32_t sets, int32_t threads, int32_t times) {
  static hwopt_pool pool;
  context mine = {&pool, NULL, NULL, NULL, threads};
  struct timespec from, to;
  int failed = 0;
  current = &mine;
  clock_gettime(CLOCK_MONOTONIC, &from);
  for (int32_t i = 0; i < times && !failed; ++i) {
    TVMFFIAny result = {0};
    failed = kernel(NULL, arguments + (size_t)(i % sets) * (size_t)count, count, &result);
  }
  clock_gettime(CLOCK_MONOTONIC, &to);
  current = NULL;
  return failed ? -1 : ((double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec)) / times;
}

typedef struct {
  hwopt_kernel kernel;
  const TVMFFIAny *arguments;
  int32_t count;
} hwopt_timed;

/* Seconds of each of `count` calls, run once in order as a model runs them; -1 for all if one fails. */
int hwopt_time_calls(const hwopt_timed *calls, int32_t count, int32_t threads, double *seconds) {
  static hwopt_pool pool;
  context mine = {&pool, NULL, NULL, NULL, threads};
  struct timespec from, to;
  int failed = 0;
  current = &mine;
  for (int32_t i = 0; i < count && !failed; ++i) {
    TVMFFIAny result = {0};
    clock_gettime(CLOCK_MONOTONIC, &from);
    failed = calls[i].kernel(NULL, calls[i].arguments, calls[i].count, &result);
    clock_gettime(CLOCK_MONOTONIC, &to);
    seconds[i] = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
  }
  current = NULL;
  return failed;
}

/* Seconds of 20000 products that wait for each other: what the clock does, whatever others do to the caches. */
double hwopt_time_clock(void) {
  struct timespec from, to;
  volatile uint64_t seed = 3;
  uint64_t value = seed;
  clock_gettime(CLOCK_MONOTONIC, &from);
  for (int i = 0; i < 20000; ++i) value = value * value + 1;
  seed = value;
  clock_gettime(CLOCK_MONOTONIC, &to);
  return (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
}

/* Seconds of half a million products and sums, most of which wait for none: whether somebody else uses the same
 * core's units (another thread of it). */
double hwopt_time_units(void) {
  static volatile float seed = 1.0f;
  float values[64];
  struct timespec from, to;
  for (int k = 0; k < 64; ++k) values[k] = seed + (float)k;
  clock_gettime(CLOCK_MONOTONIC, &from);
  for (int i = 0; i < 4000; ++i) {
    for (int k = 0; k < 64; ++k) values[k] = values[k] * 0.5f + 1.0f;
  }
  clock_gettime(CLOCK_MONOTONIC, &to);
  for (int k = 0; k < 64; ++k) seed = seed * 0.5f + values[k] * 0.25f;
  return (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
}
