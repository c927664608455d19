"""The C library that a program becomes: its memory, its numbers, its refusals, its bytes."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwopt.emit import Buffer, Call, Program, build_library, plan_memory
from hwopt.emit.check import ALLOWED, check_program
from hwopt.emit.cpu import check_code, host_features
from hwopt.emit.driver import identifier, parameter_names
from hwopt.emit.elf import machine_of, read_object
from hwopt.emit.engine import aligned_empty
from hwopt.emit.memory import bytes_of, least_bytes, lifetimes, root_of
from hwopt.emit.products import PRODUCTS, Form, parse_emit
from hwopt.emit.toolchain import find_compiler
from hwopt.emit.weights import pack_weights
from hwopt.errors import HwoptError, ToolchainError, UnsupportedError, UsageError, VerifyError
from tests._kernels import constant, kernels, program

SYSTEM = {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # the loader: for thread-local storage
NULL, ALIGNMENT, MEMORY, CPU, KERNEL, OVERLAP = -1, -2, -3, -4, -5, -6


class Model:
    """A built library, called with arrays and an explicit workspace."""

    def __init__(self, made: Program, folder: Path, **options) -> None:
        self.built = build_library(made, folder, **options)
        self.c = ctypes.CDLL(str(folder / self.built.shared))
        self.program = made

    def run(self, *arrays, workspace=None) -> int:
        pointers = [None if a is None else ctypes.c_void_p(a.ctypes.data) for a in (*arrays, workspace)]
        return getattr(self.c, f"{self.program.name}_run")(*pointers)

    def outputs(self, *inputs, workspace=None) -> list[np.ndarray]:
        made = [aligned_empty(t.type.dims, np.dtype(t.type.dtype)) for t in self.built.outputs]
        assert self.run(*inputs, *made, workspace=workspace) == 0
        return made


def ramp(size: int = 40, start: float = 0) -> np.ndarray:
    array = aligned_empty((size,), np.dtype("float32"))
    array[:] = np.arange(size) + start
    return array


def unaligned(size: int = 40) -> np.ndarray:
    return aligned_empty((size + 1,), np.dtype("float32"))[1:]


# ------------------------------------------------------------------------------------------------------------ memory plan


@st.composite
def random_programs(draw) -> Program:
    """Calls that read earlier values, of random sizes; some values are views of others, some are outputs."""
    count = draw(st.integers(1, 12))
    buffers = {"x": Buffer("x", "float32", (16,), "input")}
    values, calls = ["x"], []
    for index in range(count):
        name, size = f"v{index}", draw(st.integers(0, 70))
        buffers[name] = Buffer(name, "float32", (size,), "temporary")
        reads = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
        calls.append(Call("k", (*reads, name)))
        values.append(name)
        if draw(st.booleans()):
            buffers[f"a{index}"] = Buffer(f"a{index}", "float32", (1, size), "temporary", alias=draw(st.sampled_from([name])))
            values.append(f"a{index}")
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True))
    return Program("m", buffers, tuple(calls), (("x", "x"),), tuple((f"out_{name}", name) for name in outputs), ())


@settings(max_examples=200, deadline=None)
@given(random_programs())
def test_no_two_buffers_that_live_at_the_same_time_share_bytes(made: Program):
    check_program(made)
    plan = plan_memory(made)
    spans = [(s, plan.offsets[s.name]) for s in lifetimes(made)]
    for span, offset in spans:
        assert offset % 64 == 0 and offset + span.bytes <= plan.arena_bytes
        for other, place in spans:
            together = span.start <= other.end and other.start <= span.end
            apart = offset + span.bytes <= place or place + other.bytes <= offset
            assert span is other or not together or apart
    assert plan.arena_bytes >= least_bytes(made)


@settings(max_examples=100, deadline=None)
@given(random_programs())
def test_every_value_keeps_its_bytes_from_its_first_to_its_last_use(made: Program):
    places = {span.name: span for span in lifetimes(made)}
    for index, call in enumerate(made.calls):
        for name in call.args:
            span = places.get(root_of(made, name))
            assert span is None or span.start <= index <= span.end


def test_a_chain_needs_room_for_two_values_only():
    made = program(("double", "x", "a"), ("double", "a", "b"), ("double", "b", "c"), ("double", "c", "d"), ("double", "d", "y"))
    assert plan_memory(made).arena_bytes == 2 * 192  # 160 bytes each, on 64-byte boundaries


def test_large_buffers_go_first_so_that_small_ones_fill_the_gaps():
    sizes = {"a": 64, "b": 1024, "c": 64, "d": 1024}
    buffers = {name: Buffer(name, "uint8", (size,), "temporary") for name, size in sizes.items()}
    calls = (Call("k", ("x", "a")), Call("k", ("a", "b")), Call("k", ("b", "c")), Call("k", ("c", "d")), Call("k", ("d", "y")))
    ends = {"x": Buffer("x", "uint8", (8,), "input"), "y": Buffer("y", "uint8", (8,), "output")}
    made = Program("m", {**buffers, **ends}, calls, (("x", "x"),), (("y", "y"),), ())
    assert plan_memory(made).arena_bytes == least_bytes(made) == 1024 + 64


def test_chance_finds_what_plain_greed_misses():
    sizes = [100352, 50176, 50176, 50176, 50176, 50176, 12544, 25088, 75264, 75264, 25088, 75264, 75264, 25088, 25088, 512]
    spans = [(0, 1), (1, 3), (2, 3), (3, 5), (4, 5), (5, 6), (6, 7), (7, 10), (8, 9), (9, 10), (10, 13), (11, 12), (12, 13)]
    spans += [(13, 14), (14, 15), (15, 16)]  # the demo model's values: from the call that writes one to the last that reads it
    buffers = {f"t{i}": Buffer(f"t{i}", "uint8", (size,), "temporary") for i, size in enumerate(sizes)}
    ends = {"x": Buffer("x", "uint8", (8,), "input"), "y": Buffer("y", "uint8", (8,), "output")}
    used = [[f"t{i}" for i, span in enumerate(spans) if call in span] for call in range(17)]
    calls = tuple(Call("k", ("x", *names, "y")) for names in used)
    made = Program("m", {**buffers, **ends}, calls, (("x", "x"),), (("y", "y"),), ())
    assert plan_memory(made).arena_bytes == least_bytes(made) == 175616
    assert plan_memory(made).offsets == plan_memory(made).offsets


def test_a_view_lies_where_its_buffer_lies_and_keeps_it_alive(tmp_path):
    view = Buffer("v", "float32", (4, 10), "temporary", alias="a")
    made = program(("double", "x", "a"), ("double", "x", "b"), ("add", "v", "b", "y"), buffers={"v": view})
    assert set(plan_memory(made).offsets) == {"a", "b"}
    (y,) = Model(made, tmp_path / "m").outputs(ramp())
    np.testing.assert_array_equal(y, ramp() * 4)


def test_a_call_may_write_over_its_argument_where_the_program_says_so(tmp_path):
    over = Buffer("b", "float32", (40,), "temporary", alias="a")
    made = program(("double", "x", "a"), ("double", "a", "b"), ("double", "b", "y"), buffers={"b": over})
    assert plan_memory(made).arena_bytes == 192
    np.testing.assert_array_equal(Model(made, tmp_path / "m").outputs(ramp())[0], ramp() * 8)


# ------------------------------------------------------------------------------------------------------------- the weights


def test_equal_constants_are_stored_once_on_64_byte_boundaries():
    a, b = np.arange(5, dtype=np.float32), np.arange(7, dtype=np.int8)
    buffers = {n: constant(n, v) for n, v in {"a": a, "b": b, "c": a.copy(), "d": b + 1}.items()}
    packed = pack_weights(Program("m", buffers, (), (), (), ()))
    assert packed.offsets == {"a": 0, "b": 64, "c": 0, "d": 128}
    assert packed.bytes == 20 + 7 + 7
    assert packed.blob[64:71] == b.tobytes()


def test_constants_reach_the_kernels(tmp_path):
    weights = {"w": constant("w", ramp(40, 5)), "v": constant("v", ramp(40, 100))}
    made = program(("add", "x", "w", "t"), ("add", "t", "v", "y"), buffers=weights)
    np.testing.assert_array_equal(Model(made, tmp_path / "m").outputs(ramp())[0], ramp() * 3 + 105)


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


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_a_kernel_that_needs_more_than_libc_is_refused_by_its_operator(tmp_path):
    for symbol, needed in (("sort", "qsort_of_tvm"), ("call", "__TVMFFIFunctionCall")):
        made = program(("double", "x", "t"), Call(symbol, ("t", "y"), label="TopK of node topk_3"))
        with pytest.raises(UnsupportedError, match=f"TopK of node topk_3 needs {needed}"):
            build_library(made, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"calls": (Call("double", ("t", "y")),)}, "reads t before it is written"),
        ({"calls": (Call("double", ("x", "t")),)}, "output y is never written"),
        ({"calls": (Call("double", ("y", "x")),)}, "writes x, which is not its to write"),
        ({"calls": (Call("double", ("x", "nowhere")),)}, "no buffer nowhere"),
        ({"outputs": (("y", "view"),)}, "view is not as large as t"),
        ({"outputs": (("y", "loop"),), "calls": ()}, "alias of itself: loop"),
    ],
)
def test_a_program_that_means_nothing_is_refused(change, text):
    good = program(("double", "x", "t"), ("double", "t", "y"))
    buffers = dict(good.buffers)
    if "view" in text:
        buffers["view"] = Buffer("view", "float32", (41,), "temporary", alias="t")
    if "loop" in text:
        buffers["loop"] = Buffer("loop", "float32", (40,), "temporary", alias="loop")
    with pytest.raises(VerifyError, match=text):
        check_program(dataclasses.replace(good, **{"buffers": buffers, **change}))


def test_constants_must_be_what_they_say_they_are():
    wrong = {"has no data": None, "its data float32": np.zeros(3, np.float32), "its data int8": np.zeros(2, np.int8)}
    for text, data in wrong.items():
        buffers = {"k": Buffer("k", "float32", (2,), "constant", data)}
        with pytest.raises(VerifyError, match=text):
            check_program(Program("m", buffers, (), (), (("y", "k"),), ()))


def test_a_missing_kernel_and_a_dtype_without_a_c_type_are_refused(tmp_path):
    with pytest.raises(VerifyError, match="no object defines quadruple"):
        build_library(program(("double", "x", "t"), ("quadruple", "t", "y")), tmp_path / "m")
    made = Program("m", {"x": Buffer("x", "float8e4m3fn", (2,), "input")}, (), (("x", "x"),), (("y", "x"),), ())
    with pytest.raises(UnsupportedError, match="no C type for x is float8e4m3fn"):
        build_library(made, tmp_path / "m")


def test_options_out_of_range_are_refused(tmp_path):
    for options in ({"threads": 0}, {"threads": 1000}, {"form": Form(parallel="tbb")}, {"form": Form(heap=False)}):
        with pytest.raises(UsageError):
            build_library(program(("double", "x", "y")), tmp_path / "m", **options)
    with pytest.raises(UsageError, match="cannot begin the name of a C function"):
        build_library(program(("double", "x", "y"), name="my-model"), tmp_path / "m")


def test_without_a_compiler_the_message_says_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(ToolchainError, match=r"no C compiler.*install one \(apt install gcc\)"):
        find_compiler("", {"PATH": str(tmp_path)})
    with pytest.raises(ToolchainError, match=r"no C compiler \(riscv64-linux-gnu-gcc\) in PATH; .*gcc-riscv64-linux-gnu"):
        find_compiler("riscv", {"PATH": str(tmp_path)})
    with pytest.raises(ToolchainError, match="'no-such-cc', which CC asks for"):
        find_compiler("", {"PATH": os.environ["PATH"], "CC": "no-such-cc -m64"})
    monkeypatch.setenv("CC", "false")
    with pytest.raises(ToolchainError, match="failed with 1"):
        build_library(program(("double", "x", "y")), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HwoptError, match=r"file/m: cannot be written: (Not a directory|File exists)"):
        build_library(program(("double", "x", "y")), tmp_path / "file" / "m")


def test_a_processor_without_the_features_gets_a_code_not_a_crash(tmp_path):
    lacking = sorted({"amx_fp16", "avx512_fp16", "avx_vnni_int8", "asimddp", "i8mm", "sve2"} - host_features())
    model = None
    for feature in lacking:
        try:
            model = Model(program(("double", "x", "y"), name=f"m_{feature}"), tmp_path / feature, features=(feature,))
        except UnsupportedError:
            continue  # a name of another machine's
        assert model.run(ramp(), ramp()) == CPU
    assert model is not None


def test_features_that_this_processor_has_are_found(tmp_path):
    known = sorted(f for f in host_features() if "static" in _safe_check_code(f) and f != "amx_tile")
    assert len(known) > 3
    model = Model(program(("double", "x", "y")), tmp_path / "m", features=known)
    assert model.outputs(ramp())[0][3] == 6


def _safe_check_code(feature: str) -> str:
    try:
        return check_code((feature,), machine_of(kernels("double")))
    except UnsupportedError:
        return ""


def test_an_unknown_feature_is_refused_with_the_nearest_name():
    with pytest.raises(UnsupportedError, match="did you mean avx512_vnni"):
        check_code(("avx512vnni",), "x86_64")
    assert "AT_HWCAP2) & 0x2000ul" in check_code(("i8mm",), "aarch64")
    assert "return 1" in check_code((), "riscv")


# ------------------------------------------------------------------------------------------------------- files and C sources


def test_two_builds_in_two_folders_give_the_same_bytes(tmp_path):
    made = program(("tasks", "x", "t"), ("add", "t", "w", "y"), buffers={"w": constant("w", ramp())})
    first, second = build_library(made, tmp_path / "a"), build_library(made, tmp_path / "deep" / "folder")
    assert first.files == second.files
    for name in first.files:
        data = (first.folder / name).read_bytes()
        assert data == (second.folder / name).read_bytes(), name
        assert bytes(tmp_path) not in data


def dynamic_symbols(path: Path, which: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


def test_the_library_needs_libc_only_and_exports_its_own_functions_only(tmp_path):
    built = build_library(program(("tasks", "x", "y")), tmp_path / "m", threads=2)
    path = tmp_path / "m" / built.shared
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "NEEDED" in line} <= SYSTEM
    assert dynamic_symbols(path, "--defined-only") == {"m_run", "m_info", "m_set_threads", "m_release", "m_error"}


@pytest.mark.parametrize("form", ["PTHREAD", "OPENMP", "SERIAL", "NO_HEAP"])
def test_generated_c_compiles_without_warnings(form, tmp_path):
    names = Buffer("class", "float32", (40,), "input")
    made = program(("add", "class", "b.1", "t"), ("tasks", "t", "y"), buffers={"class": names}, inputs="class b.1")
    build_library(made, tmp_path / "m", features=("sse2", "avx2", "amx_int8") if machine_of(kernels("add")) == "x86_64" else ())
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-fopenmp", f"-DHWOPT_{form}", "-fsyntax-only"]
    subprocess.run(["cc", *strict, "m.c", "hwopt_runtime.c"], cwd=tmp_path / "m", check=True)


def test_headers_of_two_models_go_into_one_c_plus_plus_file(tmp_path):
    for name in ("first", "second"):
        made = program(("add", "x", "new", "y"), inputs="x new", name=name)
        build_library(made, tmp_path / name)
    source = '#include "first/first.h"\n#include "second/second.h"\n#include "first/first.h"\n'
    source += 'static_assert(FIRST_WORKSPACE_BYTES % 64 == 0, "");\n'
    source += "int main() { return second_run(0, 0, 0, 0) + (int)first_info()->inputs_count; }\n"
    (tmp_path / "use.cc").write_text(source)
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "use.cc"]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_two_models_in_one_program_share_one_runtime(tmp_path):
    for name, kernel in (("first", "tasks"), ("second", "scratch")):
        built = build_library(program((kernel, "x", "y"), name=name), tmp_path / name, threads=2)
        objects = [f"{name}.o", "hwopt_runtime.o", f"{name}_weights.o", f"{name}_kernels0.o"]
        sources = [f"{name}.c", "hwopt_runtime.c", f"{name}_weights.S"]
        subprocess.run(["cc", "-std=c11", "-O1", "-c", *sources], cwd=built.folder, check=True)
        subprocess.run(["ar", "rcsD", f"lib{name}.a", *objects], cwd=built.folder, check=True)
    (tmp_path / "main.c").write_text("""
        #include "first/first.h"
        #include "second/second.h"
        int main(void) {
          float x[40] = {5}, y[40], z[40];
          if (first_run(x, y, 0) || second_run(x, z, 0) || first_set_threads(1) || first_info()->inputs_count != 1) return 1;
          return y[0] == 2 && z[0] == 12 ? 0 : 2;
        }""")
    archives = ["first/libfirst.a", "second/libsecond.a"]
    subprocess.run(["cc", "-std=c11", "-o", "main", "main.c", *archives, "-pthread"], cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "main"], check=True)


def test_a_heap_free_build_lives_in_the_callers_workspace(tmp_path):
    made = dataclasses.replace(program(("scratch", "x", "a"), ("scratch", "a", "y")), scratch_bytes=2 * 192)
    built = build_library(made, tmp_path / "m", form=Form(parallel="serial", heap=False))
    assert not {"malloc", "calloc", "aligned_alloc", "free"} & dynamic_symbols(built.folder / built.shared, "--undefined-only")
    run = ctypes.CDLL(str(built.folder / built.shared)).m_run
    x, y, workspace = ramp(), ramp(), aligned_empty((built.workspace_bytes,), np.dtype("uint8"))
    point = lambda array: ctypes.c_void_p(array.ctypes.data)  # noqa: E731
    assert run(point(x), point(y), point(workspace)) == 0
    np.testing.assert_array_equal(y, (x * 2 + 2) * 2 + 2)
    assert run(point(x), point(y), None) == MEMORY
    assert run(point(x[:1]), point(unaligned()), point(workspace)) == ALIGNMENT


def test_parameters_get_distinct_names_that_c_and_c_plus_plus_allow():
    buffers = {n: Buffer(n, "float32", (1,), "input") for n in ("i.1", "i:1", "class", "0", "model", "ä", "int8_t", "__x")}
    made = Program("m", buffers, (), tuple((n, n) for n in buffers), (), ())
    names = parameter_names(made)
    assert names == ("i_1", "i_1_2", "class_", "x0", "model_", "x", "int8_t_", "x_2")
    assert identifier("workspace") == "workspace_"


# -------------------------------------------------------------------------------------------------------------- object files


def test_object_files_are_read_as_nm_reads_them():
    data = kernels("call", "sort", "tasks")
    found = read_object(data)
    assert {"__tvm_ffi_call", "__tvm_ffi_sort", "__tvm_ffi_tasks"} <= found.functions
    assert found.needs["qsort_of_tvm"] == ("__tvm_ffi_sort",)
    assert found.slots["__TVMFFIFunctionCall"] == ("__tvm_ffi_call",)
    assert found.slots["__TVMBackendParallelLaunch"] == ("__tvm_ffi_tasks",)
    assert "__TVMBackendParallelLaunch" in ALLOWED


@pytest.mark.parametrize("data", [b"", b"text" * 40, b"\x7fELF" + b"\xff" * 80])
def test_what_is_no_object_file_is_refused(data):
    with pytest.raises(ValueError):
        read_object(data)


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
