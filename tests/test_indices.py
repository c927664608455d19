"""Indices from outside never leave the tensor."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from hwopt.backends.ort import Session
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.io.onnx import load
from hwopt.ir import Graph
from hwopt.plugins import find_target

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)


def model(line: str, indices: str) -> Graph:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[4,3] x, int64{indices} i) => (float{{0}} y) {{ {line} }}"""
    shape = {"y = Gather(x, i)": "[3,3]", "y = GatherElements(x, i)": "[2,3]", "y = GatherND(x, i)": "[2]"}[line]
    return load(onnx.parser.parse_model(text.replace("{0}", shape)))


def compiled(graph: Graph, indices: np.ndarray) -> np.ndarray:
    program = compile_program(graph, find_target("host"), 1, "indices")
    return run_program(program, {"x": TABLE, "i": indices})["y"]


@pytest.mark.parametrize(
    ("line", "shape", "valid", "wild", "nearest"),
    [
        ("y = Gather(x, i)", "[3]", [0, 3, -4], [4, 10**12, -(10**12)], [3, 3, 0]),
        (
            "y = GatherElements(x, i)",
            "[2,3]",
            [[0, 1, 3], [-1, -4, 2]],
            [[9, 1, 3], [-(10**12), 10**12, 2]],
            [[3, 1, 3], [0, 3, 2]],
        ),
        ("y = GatherND(x, i)", "[2,2]", [[0, 2], [-1, -3]], [[4, 3], [-9, 10**12]], [[3, 2], [0, 2]]),
    ],
)
def test_wild_indices_take_the_nearest_entry(line: str, shape: str, valid: list, wild: list, nearest: list) -> None:
    graph = model(line, shape)
    for given, equal in ((valid, valid), (wild, nearest)):
        wanted = Session(graph).run({"x": TABLE, "i": np.array(equal, np.int64)})["y"]
        np.testing.assert_array_equal(compiled(graph, np.array(given, np.int64)), wanted)


def test_bounded_indices_are_no_reason_to_warn(capfd: pytest.CaptureFixture[str]) -> None:
    compiled(model("y = Gather(x, i)", "[3]"), np.array([0, 1, 2]))
    assert not capfd.readouterr().err
