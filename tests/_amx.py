"""What test_amx.py runs in a process of its own, with Intel AMX or an emulator of it (amx_emulator.c)."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.build import compile_program, object_code
from hwopt.backends.tvm.kernels import Schedule
from hwopt.backends.tvm.kernels.spec import MatmulSpec
from hwopt.backends.tvm.run import Loaded, load_objects
from hwopt.io.onnx import load
from hwopt.plugins import find_target
from hwopt.target import MicroKernel, Target
from targets import _isa_x86

NEEDED = frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"))  # what the emulator does not provide
FLAGS = NEEDED | {"avx2", "fma", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}  # of a Sapphire Rapids, as micro-kernels ask
EMULATOR: list[Any] = []  # the loaded library; none where the processor has AMX


def start(emulator: str) -> None:
    """The first thing in the process: install the emulator, or ask Linux for the tiles where the path is empty."""
    if emulator:
        EMULATOR.append(ctypes.CDLL(emulator))
        assert EMULATOR[0].amx_emulate() == 0


def counts() -> np.ndarray:
    """Configurations, tiles loaded, tiles stored, products, products' rows so far; zeros on real hardware."""
    found = (ctypes.c_uint64 * 5)()
    if EMULATOR:
        EMULATOR[0].amx_counts(found)
    return np.array(found, np.int64)


def description(bfloat16: bool = False) -> dict[str, object]:
    """The TVM target; without bfloat16 it runs on processors that have VNNI only."""
    return _isa_x86.llvm(FLAGS if bfloat16 else FLAGS - {"avx512_bf16", "amx_bf16"})


@functools.cache
def library(spec: Any, micro: MicroKernel, schedule: Schedule) -> Any:
    function = kernels.build(spec, schedule, micro, "kernel")
    return load_objects((object_code({"kernel": function}, description(micro.dtype == "bfloat16"), "test"),))


def run(
    spec: Any, micro: MicroKernel, data: np.ndarray, weights: np.ndarray, tensors: tuple = (), schedule: Schedule | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's output, flat, and how the counts grew."""
    import tvm

    schedule = schedule or kernels.default_schedule(spec, micro)
    size = spec.batch * (
        spec.m * spec.n if isinstance(spec, MatmulSpec) else spec.out_height * spec.out_width * spec.out_channels
    )
    out = tvm.runtime.tensor(np.zeros(size, spec.out_dtype))
    packed = kernels.pack(spec, weights, micro) if getattr(spec, "constant", True) else weights
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(one).reshape(-1)) for one in (data, packed, *tensors)]
    function, before = library(spec, micro, schedule)["kernel"], counts()
    function(*arguments, out)
    return out.numpy(), counts() - before


@functools.cache
def target() -> Target:
    """This machine, with AMX."""
    flags = FLAGS - {"avx512_bf16", "amx_bf16"}
    return dataclasses.replace(find_target("host"), microkernels=_isa_x86.microkernels(flags), tvm=_isa_x86.llvm(flags))


def run_model(path: Path, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """An ONNX model's outputs, and how the counts grew."""
    loaded, before = Loaded(compile_program(load(path), target(), 1, "amx")), counts()
    return loaded.run(feeds), counts() - before


def peak(micro: MicroKernel, steps: int) -> np.ndarray:
    """How the counts grew in the micro-benchmark of the peak."""
    import tvm

    from benchmarks.amx import peak_kernel

    code = object_code({"peak": peak_kernel(micro, steps)}, description(micro.dtype == "bfloat16"), "test")
    before = counts()
    load_objects((code,))["peak"](*(tvm.runtime.tensor(np.zeros(size, np.uint8)) for size in (4096, 4096)))
    return counts() - before
