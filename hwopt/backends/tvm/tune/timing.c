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
