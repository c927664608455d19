"""Several instruction sets in one library: the first that the processor has is run."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

from hwopt.backends.ort import Session
from hwopt.build import build
from hwopt.emit.build import build_library
from hwopt.emit.cpu import host_features, host_machine
from hwopt.errors import UsageError, VerifyError
from hwopt.ir import Graph
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from hwopt.target import Target
from tests._kernels import constant, program
from tests._machines import Machine, RunError, execute
from tests.test_compiler import pictures, small_net
from tests.test_cross import arm

X86 = "x86-64-v4,x86-64-v3,x86-64-v2"
ABSENT = next(
    name for name in ("amx_fp16" if host_machine() == "x86_64" else "sve2", "avx512_fp16") if name not in host_features()
)
DOUBLED = program(("double", "x", "y"))
ADDED = program(("add", "x", "x", "y"), ("add", "y", "x", "z"), outputs="z")


def tripled() -> object:
    return program(("add", "x", "x", "t"), ("add", "t", "x", "y"))


def run(folder: Path, features: tuple[str, ...], fallback_features: tuple[str, ...] = ()) -> np.ndarray:
    """Three times x on a processor with the features, else twice x."""
    library = build_library(tripled(), folder / "m", features=features, fallbacks=[(DOUBLED, fallback_features)])
    return execute(library, Machine(host_machine()), {"x": np.ones(40, np.float32)})["y"]


def test_the_first_variant_that_the_processor_has_is_run(tmp_path: Path) -> None:
    assert (run(tmp_path / "all", ()) == 3).all()
    assert (run(tmp_path / "less", (ABSENT,)) == 2).all()


def test_a_processor_that_has_none_of_them_gets_an_error_code(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        run(tmp_path, (ABSENT,), (ABSENT,))
    assert caught.value.status == 256 - 4


def test_library_and_header_say_what_the_variants_need(tmp_path: Path) -> None:
    library = build_library(tripled(), tmp_path / "m", features=(ABSENT,), fallbacks=[(DOUBLED, ())])
    assert library.variants == ((ABSENT,), ()) and library.features == ()
    text = (library.folder / "m.h").read_text()
    assert f" *   {ABSENT}\n *   any processor of its family\n" in text


def test_equal_weights_of_variants_are_stored_once(tmp_path: Path) -> None:
    data = np.arange(40, dtype=np.float32)
    buffers = {"w": constant("w", data)}
    one = program(("add", "x", "w", "y"), buffers=buffers)
    other = program(("double", "w", "y"), buffers=buffers)
    library = build_library(one, tmp_path / "m", features=(ABSENT,), fallbacks=[(other, ())])
    assert library.weight_bytes == data.nbytes
    found = execute(library, Machine(host_machine()), {"x": np.ones(40, np.float32)})["y"]
    np.testing.assert_array_equal(found, 2 * data)


def test_variants_must_be_one_model(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="different inputs or outputs"):
        build_library(DOUBLED, tmp_path / "m", fallbacks=[(ADDED, ())])
    with pytest.raises(VerifyError, match="__tvm_ffi_double is in two variants"):
        build_library(DOUBLED, tmp_path / "m", fallbacks=[(DOUBLED, ())])


def test_only_processors_can_share_a_library() -> None:
    with pytest.raises(UsageError, match="no CPU"):
        find_target("x86-64-v3,nvidia-t4")


@functools.cache
def quantized(target: str) -> Graph:
    context = Context(calibration=Samples(pictures(16, 1)), target=find_target(target))
    return parse("quantize", find_passes()).run(small_net(), context)


def agrees(graph: Graph, target: Target, machines: list[Machine], folder: Path) -> None:
    """One library gives the same numbers on every machine, those of ONNX Runtime.

    The last layer's floats may differ in the last bit: not every processor multiplies and adds with one rounding.
    """
    library, image = build(graph, target, 1, folder).library, pictures(1, 7)
    wanted = Session(graph).run(image)["y"]
    found = [execute(library, machine, image)["y"] for machine in machines if not machine.missing()]
    if not found:
        pytest.skip("; ".join(machine.missing() for machine in machines))
    for values in found:
        np.testing.assert_allclose(values, found[0], rtol=3e-7, atol=3e-7 * np.abs(wanted).max())
        np.testing.assert_allclose(values, wanted, atol=0.02 * np.abs(wanted).max())


def test_one_library_runs_on_every_x86_level(tmp_path: Path) -> None:
    machines = [Machine("x86_64", cpu) for cpu in ("", "Haswell", "Nehalem")]
    agrees(quantized("x86-64-v3"), find_target(X86), machines, tmp_path)


def test_one_library_runs_on_arm_with_and_without_dot_and_matrix_products(tmp_path: Path) -> None:
    best, *others = arm("a", "asimddp", "i8mm"), arm("b", "asimddp"), arm("c")
    machines = [Machine("aarch64", cpu) for cpu in ("max", "cortex-a76", "cortex-a72")]
    agrees(quantized("cortex-a72"), dataclasses.replace(best, fallbacks=tuple(others)), machines, tmp_path)
