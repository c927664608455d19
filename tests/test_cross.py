"""Libraries for other processors: built by a cross compiler, run under emulation where both are installed."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

import hwopt
from hwopt.backends.ort import Session
from hwopt.build import build
from hwopt.io.onnx import load, save
from hwopt.ir import Graph
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from hwopt.target import Target
from targets import _isa_arm
from tests._machines import Machine, execute
from tests.test_compiler import pictures, small_net

DEMO = Path(hwopt.__file__).with_name("demo")


def arm(cpu: str, *flags: str) -> Target:
    """A 64-bit Arm with these flags; prices are another's and do not matter here."""
    features = frozenset(flags)
    return dataclasses.replace(
        find_target("cortex-a72"), name=cpu, microkernels=_isa_arm.microkernels(features),
        tvm=_isa_arm.llvm(features), features=("asimd", *flags),
    )  # fmt: skip


BOARDS = {
    "neon": (arm("cortex-a72"), Machine("aarch64", "cortex-a72")),
    "dotprod": (arm("cortex-a76", "asimddp"), Machine("aarch64", "cortex-a76")),
    "i8mm": (arm("armv8.6-a", "asimddp", "i8mm"), Machine("aarch64", "max")),
    "armv7hf": (find_target("cortex-a7"), Machine("arm", "cortex-a7")),
    "riscv64": (find_target("riscv64"), Machine("riscv", "rv64")),
}


@pytest.fixture(params=BOARDS)
def board(request: pytest.FixtureRequest) -> tuple[Target, Machine]:
    target, machine = BOARDS[request.param]
    if reason := machine.missing():
        pytest.skip(reason)
    return target, machine


@functools.cache
def quantized() -> Graph:
    return _quantized(small_net(), Samples(pictures(16, 1)))


def _quantized(graph: Graph, samples: Samples) -> Graph:
    """With signed activations, as every target but x86 wants them."""
    return parse("quantize", find_passes()).run(graph, Context(calibration=samples, target=find_target("cortex-a72")))


@functools.cache
def demo(integer: bool) -> Graph:
    graph = load(DEMO / "fashion.onnx", shapes={"image": (1, 1, 28, 28)})
    return _quantized(graph, Samples(demo_images(64))) if integer else graph


def demo_images(count: int, first: int = 0) -> dict[str, np.ndarray]:
    data = np.load(DEMO / "fashion.npz")["calibrate"][first : first + count]
    return {"image": data.astype(np.float32) / 255}


@pytest.mark.parametrize("make", [small_net, quantized], ids=["float", "int8"])
def test_foreign_library_computes_what_onnx_runtime_does(tmp_path: Path, board: tuple[Target, Machine], make) -> None:  # type: ignore[no-untyped-def]
    target, machine = board
    graph, image = make(), pictures(1, 7)
    found = execute(build(graph, target, 1, tmp_path).library, machine, image)["y"]
    wanted = Session(graph).run(image)["y"]
    step = 0.02 if make is quantized else 1e-4  # an output quantized to 8 bits may be one step away
    np.testing.assert_allclose(found, wanted, atol=step * np.abs(wanted).max())


def test_demo_model_of_floats_runs_on_every_board(tmp_path: Path, board: tuple[Target, Machine]) -> None:
    target, machine = board
    found = execute(build(demo(False), target, 1, tmp_path).library, machine, demo_images(1, 100))
    (wanted,) = Session(demo(False)).run(demo_images(1, 100)).values()
    np.testing.assert_allclose(next(iter(found.values())), wanted, atol=1e-4 * np.abs(wanted).max())


def test_integer_kernels_of_the_demo_model_equal_the_hosts_bit_for_bit(tmp_path: Path, board: tuple[Target, Machine]) -> None:
    target, machine = board
    graph = demo(True)
    here = build(graph, find_target("host"), 1, tmp_path / "here")
    found = execute(build(graph, target, 1, tmp_path / "there").library, machine, demo_images(1, 100))
    (name,) = graph.outputs
    wanted = here.artifact.run(demo_images(1, 100))[name]
    assert len(np.unique(wanted)) > 5
    np.testing.assert_array_equal(found[name], wanted)


@pytest.mark.skipif(bool(Machine("aarch64", "max").missing()), reason=Machine("aarch64", "max").missing())
def test_artifact_for_another_machine_says_what_was_not_run(tmp_path: Path) -> None:
    save(small_net(), tmp_path / "small.onnx")
    data = {"calibrate": pictures(16, 1), "evaluate": pictures(32, 2)}
    artifact = hwopt.compile(tmp_path / "small.onnx", out=tmp_path / "a", target="cortex-a72", budget=hwopt.Budget(0.2), **data)
    assert artifact.manifest["machine"] == "aarch64"
    assert artifact.report["result"]["latency_source"] == "predicted"
    assert any("not run" in note for note in artifact.report["notes"])
    assert artifact.report["speedup"] > 1
    assert load(artifact.path / "model.onnx").outputs == ("y",)
