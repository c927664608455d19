"""The C library that a program becomes, as it runs: its numbers, its return codes, its threads."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
import threading

import numpy as np
import pytest

from hwopt.emit import Buffer, Call, Program, build_library, plan_memory
from hwopt.emit.cpu import host_features
from hwopt.emit.elf import machine_of
from hwopt.emit.engine import aligned_empty
from hwopt.emit.memory import bytes_of
from hwopt.emit.products import Form
from tests._emit import ALIGNMENT, KERNEL, NULL, OVERLAP, Model, ramp, unaligned
from tests._kernels import constant, kernels, program

# ----------------------------------------------------------------------------------------------------------------- running


def test_kernels_see_shape_dtype_and_device(tmp_path):
    made = program(("describe", "x", "y"), buffers={"x": Buffer("x", "int8", (3, 5, 7), "input")}, shape=(8,))
    (y,) = Model(made, tmp_path / "m").outputs(np.zeros((3, 5, 7), np.int8))
    np.testing.assert_array_equal(y, [3, 0, 8, 1, 1, 3, 1, 0])


@pytest.mark.parametrize("dtype", ["bool", "int64", "float16", "bfloat16", "uint16", "float64"])
def test_an_input_that_is_an_output_is_copied_whatever_its_dtype(dtype, tmp_path):
    made = Program("m", {"x": Buffer("x", dtype, (3,), "input")}, (), (("x", "x"),), (("y", "x"),), ())
    model = Model(made, tmp_path / "m")
    raw = np.arange(bytes_of(made.buffers["x"]), dtype=np.uint8)
    out = np.zeros_like(raw)
    assert model.run(raw, out) == 0
    np.testing.assert_array_equal(out, raw)


def test_outputs_that_are_constants_views_or_each_other_are_delivered(tmp_path):
    buffers = {"k": constant("k", ramp(40, 9)), "v": Buffer("v", "float32", (8, 5), "temporary", alias="t")}
    calls = (Call("double", ("x", "t")),)
    buffers |= {"x": Buffer("x", "float32", (40,), "input"), "t": Buffer("t", "float32", (40,), "temporary")}
    outputs = (("constant", "k"), ("first", "t"), ("view", "v"), ("again", "t"))
    made = Program("m", buffers, calls, (("x", "x"),), outputs, (kernels("double"),))
    assert plan_memory(made).arena_bytes == 0
    found = Model(made, tmp_path / "m").outputs(ramp())
    for have, want in zip(found, [ramp(40, 9), ramp() * 2, (ramp() * 2).reshape(8, 5), ramp() * 2], strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.skipif("avx512f" not in host_features(), reason="the kernel is AVX-512")
def test_unaligned_tensors_are_copied_not_crashed_on(tmp_path):
    model = Model(program(("vector", "x", "y"), shape=(48,)), tmp_path / "m")
    x, y = unaligned(48), unaligned(48)
    x[:] = np.arange(48)
    assert model.run(x, y) == 0
    np.testing.assert_array_equal(y, x + 1)


def test_bad_pointers_are_refused_with_a_code(tmp_path):
    model = Model(program(("double", "x", "a"), ("double", "a", "y")), tmp_path / "m")
    x, y = ramp(), ramp()
    workspace = aligned_empty((model.built.workspace_bytes + 64,), np.dtype("uint8"))
    assert model.run(None, y) == model.run(x, None) == NULL
    assert model.run(x, y, workspace=workspace[4:]) == ALIGNMENT
    assert model.run(x, x) == model.run(x, x[1:]) == OVERLAP
    assert model.run(x, workspace.view(np.float32)[:40], workspace=workspace) == OVERLAP
    model.c.m_error.restype = ctypes.c_char_p
    assert b"overlaps" in model.c.m_error(OVERLAP) and b"unknown" in model.c.m_error(99)


def test_a_run_stays_inside_of_the_callers_workspace(tmp_path):
    made = dataclasses.replace(program(("scratch", "x", "a"), ("scratch", "a", "y")), scratch_bytes=2 * 192)
    model = Model(made, tmp_path / "m", form=Form(parallel="serial", heap=False))
    size = model.built.workspace_bytes
    workspace = aligned_empty((size + 64,), np.dtype("uint8"))
    workspace[:] = 0xA5
    np.testing.assert_array_equal(model.outputs(ramp(), workspace=workspace)[0], (ramp() * 2 + 2) * 2 + 2)
    assert (workspace[size:] == 0xA5).all()
    assert (workspace[:size] != 0xA5).any()


def test_scratch_memory_that_nobody_foresaw_comes_from_the_heap(tmp_path):
    model = Model(program(("scratch", "x", "y")), tmp_path / "m")
    for _ in range(3):
        np.testing.assert_array_equal(model.outputs(ramp())[0], ramp() * 2 + 2)


def test_a_failing_kernel_ends_the_run_with_a_code(tmp_path):
    model = Model(program(("double", "x", "a"), ("fail", "a", "y")), tmp_path / "m")
    assert model.run(ramp(), ramp()) == KERNEL


def test_info_describes_the_model(tmp_path):
    class TensorInfo(ctypes.Structure):
        _fields_ = [
            ("name", ctypes.c_char_p), ("dtype", ctypes.c_char_p), ("shape", ctypes.POINTER(ctypes.c_int64)),
            ("rank", ctypes.c_int32), ("bytes", ctypes.c_uint64),
        ]  # fmt: skip

    class Info(ctypes.Structure):
        _fields_ = [
            ("name", ctypes.c_char_p), ("features", ctypes.c_char_p), ("inputs_count", ctypes.c_uint32),
            ("outputs_count", ctypes.c_uint32), ("inputs", ctypes.POINTER(TensorInfo)), ("outputs", ctypes.POINTER(TensorInfo)),
            ("arena_bytes", ctypes.c_uint64), ("workspace_bytes", ctypes.c_uint64), ("weight_bytes", ctypes.c_uint64),
            ("variants_count", ctypes.c_uint32), ("variants", ctypes.POINTER(ctypes.c_char_p)),
        ]  # fmt: skip

    buffers = {"x": Buffer("x", "float32", (8, 5), "input"), "w": constant("w", ramp())}
    made = dataclasses.replace(
        program(("add", "x", "w", "t"), ("double", "t", "y"), buffers=buffers), inputs=(('a "x"\n?', "x"),)
    )
    model = Model(made, tmp_path / "m")
    model.c.m_info.restype = ctypes.POINTER(Info)
    info = model.c.m_info().contents
    assert (info.name, info.inputs_count, info.outputs_count, info.weight_bytes) == (b"m", 1, 1, 160)
    assert (info.inputs[0].name, info.inputs[0].dtype, info.inputs[0].shape[:2]) == (b'a "x"\n?', b"float32", [8, 5])
    assert (
        (info.arena_bytes, info.workspace_bytes)
        == (model.built.arena_bytes, model.built.workspace_bytes)
        == (192, 192 + 4 * 48 + 64 + 64)
    )


# ----------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("parallel", ["pthread", "openmp", "serial"])
def test_a_parallel_loop_runs_in_as_many_tasks_as_threads_were_asked_for(parallel, tmp_path):
    model = Model(program(("tasks", "x", "y")), tmp_path / "m", form=Form(parallel=parallel), threads=2)
    assert set(model.outputs(ramp())[0]) == {1.0 if parallel == "serial" else 2.0}
    for threads in (3, 1, 2):
        assert model.c.m_set_threads(threads) == 0
        assert set(model.outputs(ramp())[0]) == {1.0 if parallel == "serial" else float(threads)}
    assert model.c.m_set_threads(0) == model.c.m_set_threads(257) == -7


@pytest.mark.parametrize("parallel", ["pthread", "openmp", "serial"])
def test_a_fixed_number_of_tasks_is_kept_and_barriers_hold(parallel, tmp_path):
    made = program(("seven", "x", "t"), ("barrier", "t", "y"), shape=(7,))
    model = Model(made, tmp_path / "m", form=Form(parallel=parallel), threads=3)
    np.testing.assert_array_equal(model.outputs(ramp(7))[0], np.arange(7) + 7)


def test_threads_may_run_one_model_at_the_same_time(tmp_path):
    model = Model(program(("scratch", "x", "a"), ("tasks", "a", "b"), ("add", "a", "x", "y")), tmp_path / "m", threads=2)
    wrong = []

    def work(start: int) -> None:
        x = ramp(40, start)
        for _ in range(200):
            (y,) = model.outputs(x)
            if not np.array_equal(y, x * 3 + 2):
                wrong.append(start)

    workers = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_child_process_starts_workers_of_its_own(tmp_path):
    build_library(program(("tasks", "x", "y")), tmp_path / "m", threads=2)
    code = f"""
import ctypes, os, signal
m = ctypes.CDLL({str(tmp_path / "m" / "libm.so")!r})
x, y = (ctypes.c_float * 40)(), (ctypes.c_float * 40)()
assert m.m_run(x, y, None) == 0 and y[0] == 2
child = os.fork()
if child == 0:
    signal.alarm(20)
    y[0] = 0
    os._exit(0 if m.m_run(x, y, None) == 0 and y[0] == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


SANITIZED = """
#include "m.h"
#include <pthread.h>
#include <stdlib.h>
static int wrong[4];
static void *work(void *id) {
  int me = *(int *)id;
  float *x = malloc(42 * sizeof(float)), *y = malloc(41 * sizeof(float)), *in = me & 1 ? x + 1 : x;
  void *workspace = me & 2 ? aligned_alloc(64, M_WORKSPACE_BYTES) : 0;
  for (int round = 0; round < 100; ++round) {
    for (int i = 0; i < 41; ++i) in[i] = (float)(i + me);
    wrong[me] += m_run(in, y, workspace) != HWOPT_OK;
    for (int i = 0; i < 41; ++i) wrong[me] += !(y[i] > 3 * in[i] + 2 && y[i] <= 3 * in[i] + 2 + 3); /* 1 to 3 tasks */
  }
  free(workspace), free(x), free(y);
  return 0;
}
int main(void) {
  pthread_t thread[4];
  int id[] = {0, 1, 2, 3};
  for (int i = 0; i < 4; ++i) pthread_create(&thread[i], 0, work, &id[i]);
  for (int i = 0; i < 4; ++i) pthread_join(thread[i], 0);
  for (int i = 0; i < 3; ++i) m_set_threads(3 - i), work(&id[i]);
  return wrong[0] + wrong[1] + wrong[2] + wrong[3] ? 1 : 0;
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_driver_is_clean_under_sanitizers_with_four_threads_in_one_model(sanitizer, tmp_path):
    made = program(("scratch", "x", "a"), ("tasks", "a", "b"), ("add", "a", "x", "c"), ("add", "c", "b", "y"), shape=(41,))
    folder = build_library(made, tmp_path / "m", threads=2).folder
    (folder / "main.c").write_text(SANITIZED)
    flags = ["-std=c11", "-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread", "-o", "main"]
    sources = ["main.c", "m.c", "hwopt_runtime.c", "m_weights.S", "m_kernels0.o"]
    if subprocess.run(["cc", *flags, *sources], cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    done = subprocess.run(["./main"], cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[:2000]


# --------------------------------------------------------------------------------------------------------------- with TVM


def test_a_kernel_of_tvms_runs_with_scratch_memory_and_threads(tmp_path):
    tvm = pytest.importorskip("tvm")
    from tvm import s_tir, te

    a = te.placeholder((64, 256), name="A")
    b = te.compute((64, 256), lambda i, j: te.exp(a[i, j]) + 1.0, name="B")  # 64 KiB: from the runtime's scratch memory
    c = te.compute((64, 256), lambda i, j: b[i, j] * b[i, j] + te.tanh(a[i, j]), name="C")
    schedule = s_tir.Schedule(te.create_prim_func([a, c]))
    schedule.parallel(schedule.get_loops(schedule.get_sblock("C"))[0])
    function = schedule.mod["main"].with_attr("global_symbol", "m_fused")
    machine = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}[machine_of(kernels("double"))]
    library = tvm.tirx.build(tvm.IRModule({"m_fused": function}), target=tvm.target.Target({"kind": "llvm", "mtriple": machine}))
    library.write_to_file(str(tmp_path / "k.o"))  # with TVM's own checks of dtype, shape and strides in it
    buffers = {"x": Buffer("x", "float32", (64, 256), "input"), "y": Buffer("y", "float32", (64, 256), "output")}
    objects = ((tmp_path / "k.o").read_bytes(),)
    made = Program("m", buffers, (Call("m_fused", ("x", "y")),), (("x", "x"),), (("y", "y"),), objects)
    x = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    (y,) = Model(made, tmp_path / "m", threads=2).outputs(x)
    np.testing.assert_allclose(y, (np.exp(x) + 1) ** 2 + np.tanh(x), rtol=1e-5)
