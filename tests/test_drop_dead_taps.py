"""Taps of a kernel that only ever see padding go; ONNX Runtime is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.pipeline import Context, run_pass
from passes.drop_dead_taps import DropDeadTaps
from tests._clean import apply


def graph_of(image: str, out: str, weight: str, attributes: str) -> Graph:
    count = 3 * int(np.prod([int(size) for size in weight.split(",")]))
    values = ", ".join(f"{value:.4f}" for value in np.random.default_rng(0).normal(size=2 * count))
    text = f"""<ir_version: 10, opset_import: ["" : 21]> agraph (float[1,3,{image}] x) => (float[1,2,{out}] y)
    <float[2,3,{weight}] w = {{{values}}}> {{ y = Conv <{attributes}> (x, w) }}"""
    return from_model(parser.parse_model(text))


@pytest.mark.parametrize(
    ("image", "out", "weight", "attributes", "left"),
    [
        ("5,5", "5,5", "3,3", "dilations = [6,6], pads = [6,6,6,6]", (1, 1)),
        ("5,9", "5,9", "3,3", "dilations = [6,6], pads = [6,6,6,6]", (1, 3)),
        ("4", "4", "5", "dilations = [3], pads = [6,6]", (3,)),
        ("4", "3", "7", "strides = [2], pads = [5,2]", (6,)),
        ("3,4,5", "3,4,5", "3,3,3", "dilations = [4,4,4], pads = [4,4,4,4,4,4]", (1, 1, 3)),
        ("4", "7", "1", "pads = [0,3]", (1,)),
        ("2", "9", "5", "pads = [0,11]", (2,)),
    ],
)
def test_dead_taps_go_and_the_others_stay(image: str, out: str, weight: str, attributes: str, left: tuple[int, ...]) -> None:
    after = apply(DropDeadTaps(), graph_of(image, out, weight, attributes))
    assert after.constant(after.nodes[0].inputs[1]).shape[2:] == left


@pytest.mark.parametrize(
    ("image", "out", "weight", "attributes"),
    [
        ("7,7", "7,7", "3,3", "dilations = [6,6], pads = [6,6,6,6]"),
        ("4", "2", "3", "dilations = [3], pads = [2,2]"),
        ("4", "8", "2", "dilations = [9], pads = [8,5]"),
    ],
)
def test_taps_that_see_data_stay(image: str, out: str, weight: str, attributes: str) -> None:
    graph = graph_of(image, out, weight, attributes)
    assert run_pass(DropDeadTaps(), graph, Context()) is graph
