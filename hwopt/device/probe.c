/* What `hwopt profile --device` asks a device, in a library that is uploaded: its caches, and how fast they are read. */
#include "hwopt_types.h"
#include "hwopt_runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PROBE(name)                                                                                  \
  int __tvm_ffi_hwopt_probe_##name(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result); \
  int __tvm_ffi_hwopt_probe_##name(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result)

typedef uint64_t wide __attribute__((vector_size(64))); /* a line of most caches */

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int give(TVMFFIAny *result, double number) {
  result->type_index = 3; /* kTVMFFIFloat */
  memcpy(&result->value, &number, sizeof number);
  return 0;
}

static int first_word(const char *what, int index, char *word) {
  char path[96];
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, what);
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  int found = fscanf(file, "%31s", word);
  fclose(file);
  return found == 1;
}

/* (level) -> bytes of that data cache of the first core; 0 where the system does not tell */
PROBE(cache) {
  double found = 0;
  (void)self;
  if (count != 1) return -1;
  for (int index = 0; index < 8; ++index) {
    char kind[32], level[32], size[32], unit = 0;
    long bytes = 0;
    if (!first_word("type", index, kind) || !first_word("level", index, level) || !first_word("size", index, size)) continue;
    if (!strcmp(kind, "Instruction") || atol(level) != given[0].value.v_int64) continue;
    if (sscanf(size, "%ld%c", &bytes, &unit) >= 1) found = (double)bytes * (unit == 'K' ? 1 << 10 : unit == 'M' ? 1 << 20 : 1);
  }
  return give(result, found);
}

/* (bytes, times) -> seconds of reading so many bytes once, which lie where the time before left them */
PROBE(read) {
  (void)self;
  if (count != 2) return -1;
  int64_t times = given[1].value.v_int64;
  size_t lines = (size_t)given[0].value.v_int64 / sizeof(wide) / 4 * 4;
  wide *data = aligned_alloc(sizeof(wide), (lines + 1) * sizeof(wide)), sums[4] = {{0}};
  volatile uint64_t kept;
  if (!data) return give(result, -1);
  memset(data, 1, (lines + 1) * sizeof(wide));
  double began = now();
  for (int64_t turn = 0; turn < times; ++turn) {
    const wide *from = data;
    __asm__ volatile("" : "+r"(from) : : "memory"); /* so that every turn reads */
    for (size_t i = 0; i < lines; i += 4)
      for (size_t k = 0; k < 4; ++k) sums[k] += from[i + k]; /* which do not wait for each other */
  }
  double seconds = (now() - began) / (double)times;
  kept = (sums[0] + sums[1] + sums[2] + sums[3])[0];
  (void)kept;
  free(data);
  return give(result, seconds);
}

/* () -> seconds of 20000 products that wait for each other: what the clock does, whatever others do to the caches */
PROBE(clock) {
  volatile uint64_t seed = 3;
  uint64_t value = seed;
  (void)self, (void)given, (void)count;
  double began = now();
  for (int i = 0; i < 20000; ++i) value = value * value + 1;
  seed = value;
  return give(result, now() - began);
}
