"""Linear layers over tokens, written as a Gemm between reshapes, become one product; ONNX Runtime is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.analysis.regions import regions
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.pipeline import Context, run_pass
from passes.unflatten_gemm import UnflattenGemm
from tests._clean import apply, ops

NUMBERS = ", ".join(f"{value:.4f}" for value in np.random.default_rng(0).normal(size=24))


def graph_of(gemm: str, weight: str = "4,6", behind: str = "2,3,6", flat: str = "-1,4") -> Graph:
    rank = behind.count(",") + 1
    text = f"""<ir_version: 10, opset_import: ["" : 21]> agraph (float[2,3,4] x) => (float[{behind}] y)
    <float[{weight}] w = {{{NUMBERS}}}, float[6] b = {{1,2,3,4,5,6}}, int64[2] flat = {{{flat}}}, int64[{rank}] s = {{{behind}}}>
    {{ m = Reshape(x, flat) h = {gemm} r = Reshape(h, s) y = Gelu(r) }}"""
    return from_model(parser.parse_model(text))


@pytest.mark.parametrize(
    ("gemm", "weight", "left"),
    [
        ("Gemm(m, w, b)", "4,6", ["MatMul", "Add", "Gelu"]),
        ("Gemm <transB = 1> (m, w, b)", "6,4", ["MatMul", "Add", "Gelu"]),
        ("MatMul(m, w)", "4,6", ["MatMul", "Gelu"]),
    ],
)
def test_product_between_reshapes_and_what_follows_are_one_region(gemm: str, weight: str, left: list[str]) -> None:
    after = apply(UnflattenGemm(), graph_of(gemm, weight))
    assert ops(after) == left
    assert len(regions(after)) == 1


@pytest.mark.parametrize(
    ("gemm", "behind", "flat"),
    [
        ("Gemm <alpha = 0.5> (m, w, b)", "2,3,6", "-1,4"),
        ("Gemm(m, w, b)", "3,2,6", "-1,4"),  # other leading axes than those of x
        ("Gemm(m, w, b)", "2,3,2,3", "-1,4"),  # heads, which are columns
    ],
)
def test_other_products_stay(gemm: str, behind: str, flat: str) -> None:
    graph = graph_of(gemm, behind=behind, flat=flat)
    assert run_pass(UnflattenGemm(), graph, Context()) is graph
