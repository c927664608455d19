"""Kernels in C with TVM's packed calling convention: what the emitter's tests build programs from."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hwopt.emit import Buffer, Call, Program

HEAD = r"""
#include <stdint.h>
#include <stddef.h>
#include <string.h>
typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } Type;
typedef struct { void *data; Device device; int32_t ndim; Type type; int64_t *shape, *strides; uint64_t byte_offset; } Tensor;
typedef struct { int32_t type; uint32_t padding; void *pointer; } Any;
typedef struct { void *sync; int32_t tasks; } Env;
#define WEAK __attribute__((weak))
WEAK void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
WEAK int (*__TVMBackendFreeWorkspace)(int, int, void *);
WEAK int (*__TVMBackendParallelLaunch)(int (*)(int, Env *, void *), void *, int);
WEAK int (*__TVMBackendParallelBarrier)(int, Env *);
static Tensor *tensor(const Any *a, int i) { return a[i].pointer; }
static float *data(const Any *a, int i) { return tensor(a, i)->data; }
static int64_t size(const Tensor *t) { int64_t n = 1; for (int i = 0; i < t->ndim; ++i) n *= t->shape[i]; return n; }
#define KERNEL(name) int __tvm_ffi_##name(void *self, const Any *a, int32_t count, Any *result)
#define EACH(i, n) for (int64_t i = 0; i < (n); ++i)
"""

BODIES = {
    "add": "KERNEL(add) { EACH(i, size(tensor(a, 2))) data(a, 2)[i] = data(a, 0)[i] + data(a, 1)[i]; return 0; }",
    "double": "KERNEL(double) { EACH(i, size(tensor(a, 1))) data(a, 1)[i] = 2 * data(a, 0)[i]; return 0; }",
    # sixteen floats at once from memory that TVM promises is aligned: crashes where that is not so
    "vector": """typedef float Wide __attribute__((vector_size(64)));
        KERNEL(vector) { EACH(i, size(tensor(a, 1)) / 16)
            ((volatile Wide *)data(a, 1))[i] = ((volatile Wide *)data(a, 0))[i] + 1; return 0; }""",
    # through scratch memory, two blocks at a time
    "scratch": """KERNEL(scratch) {
        int64_t n = size(tensor(a, 1));
        float *one = __TVMBackendAllocWorkspace(1, 0, n * 4, 2, 32);
        if (!one) return -1;
        float *two = __TVMBackendAllocWorkspace(1, 0, n * 4, 2, 32);
        if (!two || (uintptr_t)one % 64 || (uintptr_t)two % 64) return -1;
        EACH(i, n) one[i] = data(a, 0)[i] + 1;
        EACH(i, n) two[i] = one[i] * 3;
        EACH(i, n) data(a, 1)[i] = two[i] - one[i];
        return __TVMBackendFreeWorkspace(1, 0, two) | __TVMBackendFreeWorkspace(1, 0, one); }""",
    # result[i] = the number of tasks; every worker through its own scratch memory
    "tasks": """static int tasks_body(int task, Env *env, void *closure) {
        Tensor *out = closure;
        int64_t n = size(out), each = (n + env->tasks - 1) / env->tasks;
        float *mine = __TVMBackendAllocWorkspace(1, 0, each * 4, 2, 32);
        if (!mine) return -1;
        EACH(i, each) mine[i] = env->tasks;
        EACH(i, each) if (task * each + i < n) ((float *)out->data)[task * each + i] = mine[i];
        return __TVMBackendFreeWorkspace(1, 0, mine); }
        KERNEL(tasks) { return __TVMBackendParallelLaunch(tasks_body, tensor(a, 1), 0); }""",
    # first every task writes its part, then, after a barrier, reads its neighbour's
    "barrier": """static float shared[256];
        static int barrier_body(int task, Env *env, void *closure) {
        for (int round = 0; round < 50; ++round) {
            shared[task] = task + round;
            if (__TVMBackendParallelBarrier(task, env)) return -1;
            if (shared[(task + 1) % env->tasks] != (task + 1) % env->tasks + round) return -1;
            if (__TVMBackendParallelBarrier(task, env)) return -1;
        }
        return 0; }
        KERNEL(barrier) { memcpy(data(a, 1), data(a, 0), size(tensor(a, 1)) * 4);
            return __TVMBackendParallelLaunch(barrier_body, NULL, 0); }""",
    "seven": """static int seven_body(int task, Env *env, void *closure) {
            ((float *)closure)[task] = task + env->tasks; return 0; }
        KERNEL(seven) { return __TVMBackendParallelLaunch(seven_body, data(a, 1), 7); }""",
    "fail": "KERNEL(fail) { return -1; }",
    "sort": "extern int qsort_of_tvm(void); KERNEL(sort) { return qsort_of_tvm(); }",
    "call": "WEAK int (*__TVMFFIFunctionCall)(void); KERNEL(call) { return __TVMFFIFunctionCall(); }",
    "describe": """KERNEL(describe) { Tensor *t = tensor(a, 0); float *o = data(a, 1);
        o[0] = t->ndim; o[1] = t->type.code; o[2] = t->type.bits; o[3] = t->type.lanes; o[4] = t->device.type;
        o[5] = t->ndim ? t->shape[0] : -1; o[6] = t->strides == NULL; o[7] = t->byte_offset; return 0; }""",
}


@functools.cache
def kernels(*names: str) -> bytes:
    """One object file with these kernels."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "k.c"
        source.write_text("\n".join([HEAD, *(BODIES[name] for name in names)]))
        command = ["cc", "-O1", "-w", "-fPIC", "-mavx512f" if "vector" in names else "-O1", "-c", "k.c", "-o", "k.o"]
        subprocess.run(command, cwd=folder, check=True)
        return (Path(folder) / "k.o").read_bytes()


def program(
    *calls: Call | tuple, buffers: dict[str, Buffer] | None = None, shape: tuple[int, ...] = (40,), **named: str
) -> Program:
    """A program from calls (symbol, argument...): x is its input, y its output unless `inputs`/`outputs` name others."""
    made = [call if isinstance(call, Call) else Call(call[0], call[1:], label=f"node_{call[0]}") for call in calls]
    inputs, outputs = named.get("inputs", "x").split(), named.get("outputs", "y").split()
    known = dict(buffers or {})
    for name in dict.fromkeys([*inputs, *(name for call in made for name in call.args), *outputs]):
        kind = "input" if name in inputs else "output" if name in outputs else "temporary"
        known.setdefault(name, Buffer(name, "float32", shape, kind))
    used = tuple(sorted({call.symbol for call in made} & set(BODIES)))
    objects = (kernels(*used),) if used else ()
    pairs: Callable = lambda names: tuple((name, name) for name in names)  # noqa: E731
    return Program(named.get("name", "m"), known, tuple(made), pairs(inputs), pairs(outputs), objects)


def constant(name: str, data: np.ndarray) -> Buffer:
    return Buffer(name, data.dtype.name, data.shape, "constant", data)
