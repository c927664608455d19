"""Convolutions over images one pixel wide become one-dimensional; ONNX Runtime is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.pipeline import Context, run_pass
from passes.flatten_conv import FlattenConv
from tests._clean import apply, ops

WEIGHTS = ", ".join(f"{value:.4f}" for value in np.random.default_rng(0).normal(size=72))


def graph_of(shape: str, out: str, weight: str, attributes: str, axis: int) -> Graph:
    text = f"""<ir_version: 10, opset_import: ["" : 21]> agraph (float[1,3,{shape}] x) => (float[1,{out}] y)
    <float[4,3,{weight}] w = {{{WEIGHTS}}}, int64[1] a = {{{axis}}}>
    {{ h = Conv <{attributes}> (x, w) s = Squeeze(h, a) y = Relu(s) }}"""
    return from_model(parser.parse_model(text))


@pytest.mark.parametrize(
    ("shape", "out", "weight", "attributes", "axis"),
    [
        ("9,1", "4,5", "6,1", "pads = [1,0,0,0]", -1),
        ("1,9", "4,4", "1,6", "strides = [3,2], pads = [0,3,0,1]", 2),
        ("1,11", "4,1", "1,6", "dilations = [1,2], kernel_shape = [1,6]", 2),
    ],
)
def test_one_pixel_wide(shape: str, out: str, weight: str, attributes: str, axis: int) -> None:
    after = apply(FlattenConv(), graph_of(shape, out, weight, attributes, axis))
    assert ops(after) == ["Squeeze", "Conv", "Relu"]
    assert len(after.tensor(after.nodes[1].output).dims) == 3


@pytest.mark.parametrize(
    ("shape", "out", "weight", "attributes", "axis"),
    [
        ("6,3", "4,3", "6,1", "pads = [0,0,0,0]", 2),
        ("9,2", "4,7", "3,2", "pads = [0,0,0,0]", 3),
        ("9,1", "4,9", "2,3", "pads = [1,1,0,1]", 3),
    ],
)
def test_wider_images_stay(shape: str, out: str, weight: str, attributes: str, axis: int) -> None:
    graph = graph_of(shape, out, weight, attributes, axis)
    assert run_pass(FlattenConv(), graph, Context()) is graph
