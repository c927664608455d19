"""What a build delivers and what it refuses: files, symbols, C sources, bytes."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hwopt.emit import Buffer, Call, Program, build_library
from hwopt.emit.check import ALLOWED, check_program
from hwopt.emit.cpu import check_code, host_features
from hwopt.emit.driver import identifier, parameter_names
from hwopt.emit.elf import machine_of, read_object
from hwopt.emit.engine import aligned_empty
from hwopt.emit.products import Form
from hwopt.emit.toolchain import find_compiler
from hwopt.errors import HwoptError, ToolchainError, UnsupportedError, UsageError, VerifyError
from tests._emit import ALIGNMENT, CPU, MEMORY, SYSTEM, Model, ramp, unaligned
from tests._kernels import constant, kernels, program


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


def test_weights_as_a_c_array_serve_compilers_without_incbin(tmp_path):
    w = ramp(41, 7)[:40]
    made = program(("add", "x", "w", "y"), buffers={"w": constant("w", w)})
    folder = build_library(made, tmp_path / "m", form=Form(("source", "array"))).folder
    sources = ["m.c", "hwopt_runtime.c", "m_weights.c", "m_kernels0.o"]
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fPIC", "-shared", "-pthread"]
    subprocess.run(["cc", *strict, "-o", "libm.so", *sources], cwd=folder, check=True)
    x, y = ramp(), ramp()
    run = ctypes.CDLL(str(folder / "libm.so")).m_run
    assert run(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), None) == 0
    np.testing.assert_array_equal(y, x + w)


def test_the_header_says_how_many_threads_a_run_uses(tmp_path):
    build_library(program(("double", "x", "y")), tmp_path / "m", threads=3)
    assert "1 to 256; 3 until this is called" in (tmp_path / "m" / "m.h").read_text()
