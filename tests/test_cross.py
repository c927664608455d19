"""Libraries for other processors: built by a cross compiler, run under emulation where both are installed."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
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
from tests.test_compiler import pictures, small_net

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
needs_cross = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"{COMPILER} and {EMULATOR} are not installed"
)
MAIN = """
#include <stdio.h>
#include "small.h"
static float x[3 * 16 * 16] __attribute__((aligned(64))), y[10];
int main(void) {
  while (fread(x, sizeof x, 1, stdin) == 1) {
    int status = small_run(x, y, NULL);
    if (status != 0) return status < 0 ? -status : status;
    fwrite(y, sizeof y, 1, stdout);
  }
  return 0;
}
"""


def dotprod() -> Target:
    flags = frozenset({"asimddp"})
    return dataclasses.replace(
        find_target("cortex-a72"), name="cortex-a76", microkernels=_isa_arm.microkernels(flags),
        tvm=_isa_arm.llvm(flags, "cortex-a76"), features=("asimd", "asimddp"),
    )  # fmt: skip


def emulated(folder: Path, images: np.ndarray) -> np.ndarray:
    """Outputs of the AArch64 library for each image."""
    (folder / "main.c").write_text(MAIN)
    command = [COMPILER, "-O1", "main.c", "-L.", "-lsmall", "-Wl,-rpath,$ORIGIN", "-o", "run"]
    subprocess.run(command, cwd=folder, check=True)
    line = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(folder / "run")]
    done = subprocess.run(line, input=images.tobytes(), capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.float32).reshape(-1, 10)


def quantized() -> Graph:
    quantize = parse("quantize", find_passes())
    return quantize.run(small_net(), Context(calibration=Samples(pictures(16, 1)), target=find_target("cortex-a72")))


@needs_cross
@pytest.mark.parametrize("target", [find_target("cortex-a72"), dotprod()], ids=["neon", "dotprod"])
@pytest.mark.parametrize("make", [small_net, quantized], ids=["float", "int8"])
def test_arm_library_computes_what_onnx_runtime_does(tmp_path: Path, target: Target, make) -> None:  # type: ignore[no-untyped-def]
    graph, images = make(), pictures(4, 7)["x"]
    built = build(graph, target, 1, tmp_path)
    found = emulated(built.library.folder, images)
    session = Session(graph)
    wanted = np.concatenate([session.run({"x": image[None]})["y"] for image in images])
    step = 0.02 if make is quantized else 1e-4  # an output quantized to 8 bits may be one step away
    np.testing.assert_allclose(found, wanted, atol=step * np.abs(wanted).max())


@needs_cross
def test_artifact_for_another_machine_says_what_was_not_run(tmp_path: Path) -> None:
    save(small_net(), tmp_path / "small.onnx")
    data = {"calibrate": pictures(16, 1), "evaluate": pictures(32, 2)}
    artifact = hwopt.compile(tmp_path / "small.onnx", out=tmp_path / "a", target="cortex-a72", budget=hwopt.Budget(0.2), **data)
    assert artifact.manifest["machine"] == "aarch64"
    assert artifact.report["result"]["latency_source"] == "predicted"
    assert any("not run" in note for note in artifact.report["notes"])
    assert artifact.report["speedup"] > 1
    assert load(artifact.path / "model.onnx").outputs == ("y",)
