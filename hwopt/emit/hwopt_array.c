/* A functional model of a weight-stationary systolic array: computes what the array computes and counts what it would take.
 *
 * Kernels call begin, then load, compute and store for every block of weights. Cycles are those of the cost model: a block of
 * weights takes ROWS cycles to load, every position one, the last sums ROWS + COLUMNS - 2 to leave; DRAM traffic hides behind
 * that where scratchpads are double buffered. Counters are one set per process: they belong to a simulation. */
#include <stdatomic.h>
#include <stdint.h>

#include "hwopt_array.h"

static _Thread_local const int8_t *kept; /* the block of weights that is in the array: [columns][rows] */
static _Thread_local int32_t kept_rows;  /* how many of its rows hold weights */

static atomic_ullong kernels, macs, busy, stalled, elements_cycles, input_bytes, weight_bytes, sum_bytes, dram_bytes;
static _Thread_local uint64_t now; /* cycles of the array in the kernel that is running */
static _Thread_local uint64_t transfer, after;

static uint64_t over(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

/* What crosses the DRAM interface: an operand that does not stay on chip is fetched again for every block of the other. */
static uint64_t traffic(const hwopt_array_shape *s) {
  uint64_t inputs = s->input_bytes, weights = s->weight_bytes, across = over(s->n, HWOPT_ARRAY_COLUMNS);
  uint64_t groups = s->groups, parts = s->parts;
  if (inputs > groups * parts * HWOPT_ARRAY_INPUT_BYTES) inputs *= across;
  if (weights > groups * HWOPT_ARRAY_WEIGHT_BYTES) weights *= parts;
  return inputs + weights + s->output_bytes;
}

int32_t hwopt_array_begin(int64_t m, int64_t n, int64_t k, int64_t groups, int64_t parts, int64_t inputs, int64_t outputs,
                          int64_t steps) {
  hwopt_array_shape shape = {(uint64_t)m, (uint64_t)n, (uint64_t)k, (uint64_t)groups, (uint64_t)parts, (uint64_t)inputs,
                             (uint64_t)(n * k * groups), (uint64_t)outputs};
  uint64_t bytes = traffic(&shape), first = 2ull * HWOPT_ARRAY_ROWS * HWOPT_ARRAY_COLUMNS;
  uint64_t once = shape.input_bytes + shape.weight_bytes + shape.output_bytes;
  now = 0;
  transfer = (uint64_t)((double)bytes / HWOPT_ARRAY_DRAM_BYTES_PER_CYCLE);
  after = (uint64_t)((double)(first < once ? first : once) / HWOPT_ARRAY_DRAM_BYTES_PER_CYCLE) + HWOPT_ARRAY_LAUNCH_CYCLES +
          over((uint64_t)steps, HWOPT_ARRAY_LANES);
  kernels += 1, macs += shape.m * shape.n * shape.k * shape.groups, dram_bytes += bytes;
  elements_cycles += after;
  return 0;
}

int32_t hwopt_array_load(const int8_t *weights, int32_t rows) {
  kept = weights, kept_rows = rows;
  now += HWOPT_ARRAY_ROWS;
  weight_bytes += (uint64_t)rows * HWOPT_ARRAY_COLUMNS;
  return 0;
}

int32_t hwopt_array_compute(int32_t *sums, const int8_t *data, int64_t stride, int64_t positions) {
  for (int64_t p = 0; p < positions; ++p, sums += HWOPT_ARRAY_COLUMNS, data += stride)
    for (int32_t c = 0; c < HWOPT_ARRAY_COLUMNS; ++c) {
      const int8_t *column = kept + (int64_t)c * HWOPT_ARRAY_ROWS;
      int32_t sum = 0;
      for (int32_t r = 0; r < kept_rows; ++r) sum += (int32_t)data[r] * column[r];
      sums[c] += sum;
    }
  now += (uint64_t)positions;
  input_bytes += (uint64_t)positions * (uint64_t)kept_rows;
  sum_bytes += (uint64_t)positions * HWOPT_ARRAY_COLUMNS * 8; /* read and written, 4 bytes each */
  return 0;
}

int32_t hwopt_array_store(void) {
  now += HWOPT_ARRAY_ROWS + HWOPT_ARRAY_COLUMNS - 2;
  return 0;
}

int32_t hwopt_array_end(void) {
  uint64_t waits = HWOPT_ARRAY_DOUBLE_BUFFERED ? (transfer > now ? transfer - now : 0) : transfer;
  busy += now, stalled += waits;
  return 0;
}

void HWOPT_ARRAY_SIMULATED(hwopt_simulation *found, int restart) {
  found->kernels = kernels, found->macs = macs, found->dram_bytes = dram_bytes;
  found->array_cycles = busy, found->stall_cycles = stalled, found->other_cycles = elements_cycles;
  found->joules = (double)macs * HWOPT_ARRAY_MAC_JOULES + (double)input_bytes * HWOPT_ARRAY_INPUT_JOULES +
                  (double)weight_bytes * HWOPT_ARRAY_WEIGHT_JOULES + (double)sum_bytes * HWOPT_ARRAY_OUTPUT_JOULES +
                  (double)dram_bytes * HWOPT_ARRAY_DRAM_JOULES;
  if (restart)
    kernels = 0, macs = 0, busy = 0, stalled = 0, elements_cycles = 0, input_bytes = 0, weight_bytes = 0, sum_bytes = 0, dram_bytes = 0;
}
