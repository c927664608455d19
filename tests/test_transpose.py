"""Transpositions by squares in registers, against numpy: every element type, edges, several runs of axes."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.kernels.transpose import TransposeSpec, turned
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.plugins import find_target


@pytest.mark.parametrize(
    ("shape", "order", "found"),
    [
        ((1, 30, 40, 21), (0, 3, 1, 2), (1, 1200, 21)),
        ((2, 21, 30, 40), (0, 2, 3, 1), (2, 21, 1200)),
        ((2, 8, 9, 10), (2, 3, 0, 1), (1, 16, 90)),
        ((2, 1, 9, 10), (0, 3, 1, 2), (2, 9, 10)),
        ((2, 30, 8, 40), (0, 2, 1, 3), None),  # rows stay whole
        ((9, 10, 11), (2, 1, 0), None),
        ((4, 7, 9), (0, 2, 1), None),  # too few rows for a square
        ((4, 7, 9), (0, 1, 2), None),
    ],
)
def test_which_permutations_turn_matrices(shape: tuple, order: tuple, found: tuple | None) -> None:
    assert turned(shape, order, "float32") == (None if found is None else TransposeSpec(*found, "float32"))


@pytest.mark.parametrize("shape", [(2, 16, 32), (1, 21, 50), (3, 8, 8), (2, 8, 40), (1, 33, 9), (1, 300, 257)])
@pytest.mark.parametrize("dtype", ["float", "uint8", "int64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_matrices_are_turned(shape: tuple, dtype: str, threads: int) -> None:
    count, rows, columns = shape
    text = f"agraph ({dtype}[{count},{rows},{columns}] x) => ({dtype}[{count},{columns},{rows}] y)"
    graph = from_model(
        parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text} {{ y = Transpose <perm = [0,2,1]> (x) }}')
    )
    x = np.random.default_rng(0).integers(0, 200, shape).astype(graph.tensor("x").dtype)
    found = run_program(compile_program(graph, find_target("host"), threads), {"x": x})["y"]
    np.testing.assert_array_equal(found, x.transpose(0, 2, 1))
