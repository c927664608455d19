/* hwopt's runtime for generated models. C11 and libc; one of three ways to run parallel loops:
 *   HWOPT_PTHREAD  a pool of workers that live on (default)
 *   HWOPT_OPENMP   one OpenMP region per loop
 *   HWOPT_SERIAL   no threads at all
 * HWOPT_NO_HEAP makes it live in the caller's workspace alone. */
#define _POSIX_C_SOURCE 200809L
#include "hwopt_types.h"
#include "hwopt_runtime.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#if !defined(HWOPT_SERIAL) && !defined(HWOPT_OPENMP) && !defined(HWOPT_PTHREAD)
#define HWOPT_PTHREAD
#endif
#define ALIGNMENT 64u
#define MAX_THREADS 256
#define DLTENSOR_POINTER 7 /* kTVMFFIDLTensorPtr */
#define DEVICE_CPU 1       /* kDLCPU */

/* ---------------------------------------------------------------- memory */

typedef struct block {
  struct block *next;
  size_t bytes;
  int busy;
} block; /* in front of its memory, ALIGNMENT bytes */

struct hwopt_pool {
  block *blocks;
};

/* What the calling thread works on. Workers have one of their own, with blocks only. */
typedef struct {
  hwopt_pool *pool;
  unsigned char *scratch_base, *scratch, *scratch_end; /* a stack inside the workspace */
  int threads;
} context;

static _Thread_local context *current;

static size_t rounded(uint64_t bytes) { return (size_t)((bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT); }

static int aligned(const void *pointer) { return (uintptr_t)pointer % ALIGNMENT == 0; }

#ifdef HWOPT_NO_HEAP
static void *pool_take(hwopt_pool *pool, uint64_t bytes) { (void)pool, (void)bytes; return NULL; }
static void pool_give(hwopt_pool *pool, const void *memory) { (void)pool, (void)memory; }
static inline void pool_clear(hwopt_pool *pool) { (void)pool; }
static hwopt_pool *acquire(const hwopt_model *model, hwopt_pool *local) { (void)model; return local; }
static void give_back(const hwopt_model *model, hwopt_pool *pool) { (void)model, (void)pool; }
#else
/* Frees one idle block that was too small for a request, so that a pool settles on what its model needs. */
static void pool_drop_one(hwopt_pool *pool) {
  for (block **link = &pool->blocks; *link; link = &(*link)->next)
    if (!(*link)->busy) {
      block *gone = *link;
      *link = gone->next;
      free(gone);
      return;
    }
}

static void *pool_take(hwopt_pool *pool, uint64_t bytes) {
  block *best = NULL;
  if (bytes > SIZE_MAX / 2) return NULL;
  for (block *b = pool->blocks; b; b = b->next)
    if (!b->busy && b->bytes >= bytes && (!best || b->bytes < best->bytes)) best = b;
  if (!best) {
    pool_drop_one(pool);
    best = aligned_alloc(ALIGNMENT, ALIGNMENT + rounded(bytes));
    if (!best) return NULL;
    best->next = pool->blocks;
    best->bytes = rounded(bytes);
    pool->blocks = best;
  }
  best->busy = 1;
  return (unsigned char *)best + ALIGNMENT;
}

static void pool_give(hwopt_pool *pool, const void *memory) {
  for (block *b = pool->blocks; b; b = b->next)
    if ((const unsigned char *)b + ALIGNMENT == memory) b->busy = 0;
}

static void pool_clear(hwopt_pool *pool) {
  while (pool->blocks) {
    block *next = pool->blocks->next;
    free(pool->blocks);
    pool->blocks = next;
  }
}

/* The model's idle pool, or a new one when another thread is using it. */
static hwopt_pool *acquire(const hwopt_model *model, hwopt_pool *local) {
  hwopt_pool *pool = atomic_exchange(model->idle, NULL);
  (void)local;
  return pool ? pool : calloc(1, sizeof(hwopt_pool));
}

static void give_back(const hwopt_model *model, hwopt_pool *pool) {
  hwopt_pool *none = NULL;
  for (block *b = pool->blocks; b; b = b->next) b->busy = 0;
  if (atomic_compare_exchange_strong(model->idle, &none, pool)) return;
  pool_clear(pool);
  free(pool);
}
#endif

static void *scratch_take(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  context *c = current;
  (void)device_type, (void)device_id, (void)code, (void)bits;
  if (!c) return NULL;
  if (c->scratch && rounded(bytes) <= (size_t)(c->scratch_end - c->scratch)) {
    void *memory = c->scratch;
    c->scratch += rounded(bytes);
    return memory;
  }
  return pool_take(c->pool, bytes);
}

/* Kernels free in the reverse order of allocating, so the workspace's scratch is a stack. */
static int scratch_give(int device_type, int device_id, void *memory) {
  context *c = current;
  unsigned char *bytes = memory;
  (void)device_type, (void)device_id;
  if (!c) return -1;
  if (c->scratch_base && bytes >= c->scratch_base && bytes < c->scratch_end) {
    c->scratch = bytes;
    return 0;
  }
  pool_give(c->pool, memory);
  return 0;
}

/* ---------------------------------------------------------------- parallel loops */

typedef struct {
  void *sync_handle;
  int32_t num_task;
} TVMParallelGroupEnv;
typedef int (*parallel_body)(int task, TVMParallelGroupEnv *env, void *data);

typedef struct {
  atomic_int arrived;
  int together; /* all tasks run at the same time, so they may wait for each other */
} barrier;

static int serial(parallel_body body, void *data, int tasks) {
  barrier sync = {0, tasks <= 1};
  TVMParallelGroupEnv env = {&sync, tasks > 0 ? tasks : 1};
  int failed = 0;
  for (int i = 0; i < env.num_task; ++i) failed |= body(i, &env, data);
  return failed ? -1 : 0;
}

#if defined(HWOPT_SERIAL)
static void relax(int turn) { (void)turn; }
static int launch(parallel_body body, void *data, int tasks) { return serial(body, data, tasks); }

#elif defined(HWOPT_OPENMP)
#include <omp.h>
#include <sched.h>

static void relax(int turn) { (void)turn, (void)sched_yield(); }

static int launch(parallel_body body, void *data, int tasks) {
  int threads = current ? current->threads : 1, failed = 0, team = 1;
  context *caller = current;
  barrier sync = {0, 1};
  TVMParallelGroupEnv env = {&sync, 1};
  if (threads <= 1 || omp_in_parallel()) return serial(body, data, tasks);
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    hwopt_pool pool = {NULL};
    context mine = {&pool, NULL, NULL, NULL, 1};
    int me = omp_get_thread_num();
#pragma omp single
    {
      team = omp_get_num_threads();
      env.num_task = tasks > 0 ? tasks : team;
      sync.together = env.num_task <= team;
    }
    current = me ? &mine : caller;
    for (int i = me; i < env.num_task; i += team) failed |= body(i, &env, data);
    current = me ? NULL : caller;
    pool_clear(&pool);
  }
  return failed ? -1 : 0;
}

#else
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#define SPINS 2000 /* some 50 microseconds: longer than the pause between two kernels of a run */

/* A loop has one share per thread. The owner runs the first, and whichever of the others nobody has begun by then: a worker
 * that the system has not given a core yet holds nobody up. */
typedef struct {
  _Alignas(ALIGNMENT) atomic_int share; /* 1: there to be taken; what the loop needs was written before */
  atomic_int asleep;
  int index;
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
} worker;

static struct {
  pthread_mutex_t owner; /* whoever runs a parallel loop; a second caller runs its own loop alone */
  parallel_body body;
  void *data;
  TVMParallelGroupEnv env;
  int threads, workers;
  atomic_int spins, unfinished, failed, stop;
  worker worker[MAX_THREADS];
} team = {.owner = PTHREAD_MUTEX_INITIALIZER};

/* Waits a moment; a long wait lets others have the core. */
static void relax(int turn) {
  if (turn > SPINS) {
    sched_yield();
    return;
  }
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void run_share(int me) {
  int failed = 0;
  for (int i = me; i < team.env.num_task; i += team.threads) failed |= team.body(i, &team.env, team.data);
  if (failed) atomic_store(&team.failed, 1);
}

static void try_share(worker *w) {
  int there = 1;
  if (!atomic_compare_exchange_strong(&w->share, &there, 0)) return;
  run_share(w->index);
  atomic_fetch_sub_explicit(&team.unfinished, 1, memory_order_acq_rel);
}

static void wait_for_share(worker *w) {
  for (int i = 0, most = atomic_load(&team.spins); i < most; ++i) {
    if (atomic_load_explicit(&w->share, memory_order_relaxed) || atomic_load_explicit(&team.stop, memory_order_relaxed)) return;
    relax(i);
  }
  pthread_mutex_lock(&w->mutex);
  atomic_store(&w->asleep, 1);
  while (!atomic_load(&w->share) && !atomic_load(&team.stop)) pthread_cond_wait(&w->wake, &w->mutex);
  atomic_store(&w->asleep, 0);
  pthread_mutex_unlock(&w->mutex);
}

static void *work(void *argument) {
  worker *w = argument;
  hwopt_pool pool = {NULL};
  context mine = {&pool, NULL, NULL, NULL, 1};
  current = &mine;
  while (!atomic_load(&team.stop)) {
    wait_for_share(w);
    try_share(w);
  }
  pool_clear(&pool);
  return NULL;
}

static void nudge(worker *w) {
  if (!atomic_load(&w->asleep)) return;
  pthread_mutex_lock(&w->mutex);
  pthread_cond_signal(&w->wake);
  pthread_mutex_unlock(&w->mutex);
}

/* A child of fork has none of the parent's threads. */
static void forget_workers(void) {
  pthread_mutex_init(&team.owner, NULL);
  team.workers = 0;
}

/* Starts workers until `threads` can run together; returns how many can. The caller owns the team. */
static int gather(int threads) {
  static int registered;
  if (!registered) registered = pthread_atfork(NULL, NULL, forget_workers) == 0;
  while (team.workers < threads - 1) {
    worker *w = &team.worker[team.workers];
    atomic_store(&w->share, 0);
    atomic_store(&w->asleep, 0);
    w->index = team.workers + 1;
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->wake, NULL);
    if (pthread_create(&w->thread, NULL, work, w)) break;
    team.workers++;
  }
  return team.workers + 1 < threads ? team.workers + 1 : threads;
}

static void set_spins(int threads) {
  atomic_store(&team.spins, threads <= sysconf(_SC_NPROCESSORS_ONLN) ? SPINS : 0); /* spinning in turns on one core only costs */
}

static int launch(parallel_body body, void *data, int tasks) {
  int threads = current ? current->threads : 1;
  if (tasks > 0 && tasks < threads) threads = tasks;
  if (threads <= 1 || pthread_mutex_trylock(&team.owner)) return serial(body, data, tasks);
  if (team.workers < threads - 1) set_spins(threads);
  threads = gather(threads);
  barrier sync = {0, tasks <= threads};
  team.body = body, team.data = data, team.threads = threads;
  team.env = (TVMParallelGroupEnv){&sync, tasks > 0 ? tasks : threads};
  atomic_store(&team.failed, 0);
  atomic_store(&team.unfinished, threads - 1);
  for (int i = 0; i < threads - 1; ++i) {
    atomic_store(&team.worker[i].share, 1);
    nudge(&team.worker[i]);
  }
  run_share(0);
  for (int i = 0; i < threads - 1; ++i) try_share(&team.worker[i]);
  for (int i = atomic_load(&team.spins) ? 0 : SPINS + 1; atomic_load_explicit(&team.unfinished, memory_order_acquire); i += i <= SPINS)
    relax(i);
  int failed = atomic_load(&team.failed);
  pthread_mutex_unlock(&team.owner);
  return failed ? -1 : 0;
}

/* Unloading the library must not leave threads in its code. */
__attribute__((destructor)) static void dismiss(void) {
  atomic_store(&team.stop, 1);
  for (int i = 0; i < team.workers; ++i) {
    nudge(&team.worker[i]);
    pthread_join(team.worker[i].thread, NULL);
  }
  team.workers = 0;
}
#endif

static int wait_for_all(int task, TVMParallelGroupEnv *env) {
  barrier *sync = env->sync_handle;
  int target;
  (void)task;
  if (env->num_task == 1) return 0;
  if (!sync->together) return -1;
  target = (atomic_fetch_add(&sync->arrived, 1) / env->num_task + 1) * env->num_task;
  for (int i = 0; atomic_load(&sync->arrived) < target; i += i < INT_MAX) relax(i);
  return 0;
}

/* ---------------------------------------------------------------- what TVM's kernels call */

/* Kernels reach the runtime through these variables; theirs are weak, ours win. Hidden: one set per library. */
#define SLOT __attribute__((visibility("hidden")))
SLOT extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
SLOT extern int (*__TVMBackendFreeWorkspace)(int, int, void *);
SLOT extern int (*__TVMBackendParallelLaunch)(parallel_body, void *, int);
SLOT extern int (*__TVMBackendParallelBarrier)(int, TVMParallelGroupEnv *);
SLOT void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = scratch_take;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = scratch_give;
int (*__TVMBackendParallelLaunch)(parallel_body, void *, int) = launch;
int (*__TVMBackendParallelBarrier)(int, TVMParallelGroupEnv *) = wait_for_all;

/* Kernels check what they are given; a generated driver gives them what they expect, so the text would help nobody. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  (void)kind, (void)parts, (void)count;
}

/* ---------------------------------------------------------------- running a model */

/* One buffer of the caller, or the aligned copy that stands for it. */
typedef unsigned char *view;

static size_t table_bytes(const hwopt_model *m) {
  size_t views = m->info->inputs_count + m->info->outputs_count;
  return rounded(m->slots_count * sizeof(DLTensor)) + rounded(m->arguments_most * sizeof(TVMFFIAny)) + rounded(views * sizeof(view));
}

static int overlap(const void *a, uint64_t a_bytes, const void *b, uint64_t b_bytes) {
  uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
  return a_bytes && b_bytes && x < y + b_bytes && y < x + a_bytes;
}

static int check(const hwopt_model *m, const void *const *inputs, void *const *outputs, const void *workspace) {
  const hwopt_info *info = m->info;
  for (uint32_t i = 0; i < info->inputs_count; ++i)
    if (!inputs[i] && info->inputs[i].bytes) return HWOPT_ERROR_NULL;
  for (uint32_t i = 0; i < info->outputs_count; ++i)
    if (!outputs[i] && info->outputs[i].bytes) return HWOPT_ERROR_NULL;
  if (workspace && !aligned(workspace)) return HWOPT_ERROR_ALIGNMENT;
  for (uint32_t o = 0; o < info->outputs_count; ++o) {
    uint64_t bytes = info->outputs[o].bytes;
    if (workspace && overlap(outputs[o], bytes, workspace, info->workspace_bytes)) return HWOPT_ERROR_OVERLAP;
    for (uint32_t i = 0; i < info->inputs_count; ++i)
      if (overlap(outputs[o], bytes, inputs[i], info->inputs[i].bytes)) return HWOPT_ERROR_OVERLAP;
    for (uint32_t i = 0; i < o; ++i)
      if (overlap(outputs[o], bytes, outputs[i], info->outputs[i].bytes)) return HWOPT_ERROR_OVERLAP;
  }
  return HWOPT_OK;
}

static int cpu_good(const hwopt_model *m) {
  int known = atomic_load_explicit(m->cpu, memory_order_relaxed);
  if (!known) atomic_store(m->cpu, known = m->supported() ? 1 : -1); /* cpuid traps in virtual machines: ask once */
  return known > 0;
}

const hwopt_model *hwopt_choose(const hwopt_model *models, uint32_t count) {
  for (uint32_t i = 0; i + 1 < count; ++i)
    if (cpu_good(&models[i])) return &models[i];
  return &models[count - 1];
}

/* Aligned stand-ins for the caller's unaligned buffers. */
static int stage(const hwopt_model *m, hwopt_pool *pool, const void *const *inputs, void *const *outputs, view *views) {
  const hwopt_info *info = m->info;
  for (uint32_t i = 0; i < info->inputs_count; ++i) {
    views[i] = (unsigned char *)(uintptr_t)inputs[i]; /* kernels do not write their inputs */
    if (aligned(inputs[i])) continue;
    if (!(views[i] = pool_take(pool, info->inputs[i].bytes))) return -1;
    memcpy(views[i], inputs[i], (size_t)info->inputs[i].bytes);
  }
  views += info->inputs_count;
  for (uint32_t i = 0; i < info->outputs_count; ++i) {
    views[i] = outputs[i];
    if (!aligned(outputs[i]) && !(views[i] = pool_take(pool, info->outputs[i].bytes))) return -1;
  }
  return 0;
}

static unsigned char *resolve(const hwopt_model *m, int place, uint64_t offset, unsigned char *arena, const view *views) {
  if (place == HWOPT_ARENA) return arena + offset;
  if (place == HWOPT_WEIGHTS) return (unsigned char *)(uintptr_t)m->weights + offset;
  return views[(place == HWOPT_OUTPUT ? m->info->inputs_count : 0) + offset];
}

static int run_calls(const hwopt_model *m, unsigned char *arena, DLTensor *tensors, TVMFFIAny *arguments, const view *views) {
  for (uint32_t i = 0; i < m->slots_count; ++i) {
    const hwopt_slot *s = &m->slots[i];
    tensors[i] = (DLTensor){resolve(m, s->place, s->offset, arena, views), {DEVICE_CPU, 0}, s->rank, {s->code, s->bits, 1},
                            (int64_t *)(uintptr_t)(m->dims + s->shape), NULL, 0};
  }
  for (uint32_t i = 0; i < m->calls_count; ++i) {
    const hwopt_call *call = &m->calls[i];
    TVMFFIAny result = {0, 0, {0}};
    for (uint32_t k = 0; k < call->count; ++k)
      arguments[k] = (TVMFFIAny){DLTENSOR_POINTER, 0, {.v_ptr = &tensors[m->arguments[call->first + k]]}};
    if (call->kernel(NULL, arguments, (int32_t)call->count, &result)) return HWOPT_ERROR_KERNEL;
  }
  return HWOPT_OK;
}

static void deliver(const hwopt_model *m, unsigned char *arena, void *const *outputs, const view *views) {
  const view *results = views + m->info->inputs_count;
  for (uint32_t i = 0; i < m->copies_count; ++i) {
    const hwopt_copy *copy = &m->copies[i];
    memcpy(results[copy->output], resolve(m, copy->place, copy->offset, arena, views), (size_t)copy->bytes);
  }
  for (uint32_t i = 0; i < m->info->outputs_count; ++i)
    if (results[i] != outputs[i]) memcpy(outputs[i], results[i], (size_t)m->info->outputs[i].bytes);
}

static int run_in(const hwopt_model *m, hwopt_pool *pool, const void *const *inputs, void *const *outputs, unsigned char *workspace) {
  unsigned char *tensors = workspace + rounded(m->info->arena_bytes);
  unsigned char *arguments = tensors + rounded(m->slots_count * sizeof(DLTensor));
  view *views = (view *)(void *)(arguments + rounded(m->arguments_most * sizeof(TVMFFIAny)));
  unsigned char *scratch = tensors + table_bytes(m);
  context *outer = current;
  context mine = {pool, scratch, scratch, scratch + m->scratch_bytes, atomic_load(m->threads)};
  int code;
#ifdef HWOPT_NO_HEAP
  for (uint32_t i = 0; i < m->info->inputs_count; ++i)
    if (!aligned(inputs[i])) return HWOPT_ERROR_ALIGNMENT;
  for (uint32_t i = 0; i < m->info->outputs_count; ++i)
    if (!aligned(outputs[i])) return HWOPT_ERROR_ALIGNMENT;
#endif
  if (stage(m, pool, inputs, outputs, views)) return HWOPT_ERROR_MEMORY;
  current = &mine;
  code = run_calls(m, workspace, (DLTensor *)(void *)tensors, (TVMFFIAny *)(void *)arguments, views);
  current = outer;
  if (code == HWOPT_OK) deliver(m, workspace, outputs, views);
  return code;
}

int hwopt_run(const hwopt_model *model, const void *const *inputs, void *const *outputs, void *workspace) {
  hwopt_pool local = {NULL}, *pool;
  int code = check(model, inputs, outputs, workspace);
  if (code) return code;
  if (!cpu_good(model)) return HWOPT_ERROR_CPU;
  pool = acquire(model, &local);
  if (!pool) return HWOPT_ERROR_MEMORY;
  if (!workspace) workspace = pool_take(pool, model->info->workspace_bytes);
  code = workspace ? run_in(model, pool, inputs, outputs, workspace) : HWOPT_ERROR_MEMORY;
  give_back(model, pool);
  return code;
}

int hwopt_set_threads(const hwopt_model *model, int threads) {
  if (threads < 1 || threads > MAX_THREADS) return HWOPT_ERROR_ARGUMENT;
  atomic_store(model->threads, threads);
  return HWOPT_OK;
}

void hwopt_release(const hwopt_model *model) {
#ifdef HWOPT_NO_HEAP
  (void)model;
#else
  hwopt_pool *pool = atomic_exchange(model->idle, NULL);
  if (!pool) return;
  pool_clear(pool);
  free(pool);
#endif
}

const char *hwopt_error_text(int code) {
  switch (code) {
    case HWOPT_OK: return "no error";
    case HWOPT_ERROR_NULL: return "an input or output pointer is NULL";
    case HWOPT_ERROR_ALIGNMENT: return "the workspace (without a heap: or a tensor) is not 64-byte aligned";
    case HWOPT_ERROR_MEMORY: return "out of memory";
    case HWOPT_ERROR_CPU: return "the processor lacks an instruction set that the kernels need";
    case HWOPT_ERROR_KERNEL: return "a kernel failed";
    case HWOPT_ERROR_OVERLAP: return "an output overlaps an input, another output or the workspace";
    case HWOPT_ERROR_ARGUMENT: return "a number is out of its range";
    default: return "unknown error code";
  }
}
