"""Passes compose: prune, then factor, then share or quantize the same layer, by the name it had in the original model."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from hwopt.backends.ort import run
from hwopt.ir import Graph, Node, TensorType, descended, frozen, infer_types
from hwopt.pipeline import Context, Pass, PassManager
from hwopt.samples import Samples
from passes.low_rank import LowRank
from passes.prune_channels import PruneChannels
from passes.quantize import Quantize
from passes.share_weights import ShareWeights


def low_rank(rank: int, *shape: int) -> np.ndarray:
    """Weights [outputs, inputs, ...] that are nearly of this rank across the channels."""
    rng = np.random.default_rng(rank)
    outputs, inputs, *kernel = shape
    core = rng.standard_normal((rank, rank, *kernel))
    left, right = rng.standard_normal((outputs, rank)), rng.standard_normal((rank, inputs))
    exact = np.einsum("op,pi...,ic->oc...", left, core, right) / rank
    fan_in = inputs * int(np.prod(kernel))
    return ((exact + 0.02 * rng.standard_normal(shape)) / np.sqrt(fan_in)).astype(np.float32)


def network() -> Graph:
    """conv 3x3 -> relu -> conv 3x3 -> relu -> conv 1x1 -> relu -> pool -> gemm"""
    padded = MappingProxyType({"pads": (1, 1, 1, 1)})
    nodes = (
        Node("Conv", ("x", "w0", "b0"), ("h0",), "stem", padded),
        Node("Relu", ("h0",), ("r0",), "relu0"),
        Node("Conv", ("r0", "w1", "b1"), ("h1",), "spatial", padded),
        Node("Relu", ("h1",), ("r1",), "relu1"),
        Node("Conv", ("r1", "w2", "b2"), ("h2",), "pointwise"),
        Node("Relu", ("h2",), ("r2",), "relu2"),
        Node("GlobalAveragePool", ("r2",), ("p",), "pool"),
        Node("Flatten", ("p",), ("f",), "flat"),
        Node("Gemm", ("f", "w3", "b3"), ("y",), "fc", MappingProxyType({"transB": 1})),
    )
    shapes = {"w0": (3, 32, 3, 3, 3), "w1": (6, 32, 32, 3, 3), "w2": (6, 48, 32, 1, 1), "w3": (5, 40, 48)}
    weights = {name: low_rank(*sizes) for name, sizes in shapes.items()}
    biases = {f"b{i}": np.full(n, 0.1, np.float32) for i, n in enumerate((32, 32, 48, 40))}
    params = {name: frozen(array) for name, array in {**weights, **biases}.items()}
    types = MappingProxyType({"x": TensorType("float32", (4, 3, 8, 8))})
    return infer_types(Graph("net", ("x",), ("y",), nodes, types, MappingProxyType(params), {"": 21}))


def data(seed: int) -> Samples:
    return Samples({"x": np.random.default_rng(seed).standard_normal((32, 3, 8, 8)).astype(np.float32)})


LAYERS = ("spatial", "pointwise", "fc")
PRUNE = PruneChannels(ratio=0.25)
FACTOR = LowRank(LAYERS, rank=8, rank_in=8)


def outcome(*passes: Pass) -> tuple[Graph, float]:
    """The graph after the passes, and its relative output error on new data against what pruning alone gives."""
    ctx = Context(calibration=data(1))
    before = PassManager((PRUNE,)).run(network(), ctx).graph
    after = PassManager(passes).run(network(), ctx).graph
    feeds = next(data(2).feeds(before))
    wanted, found = run(before, feeds)["y"], run(after, feeds)["y"]
    return after, float(np.sum((found - wanted) ** 2) / np.sum((wanted - wanted.mean(0)) ** 2))


def test_prune_then_factor() -> None:
    after, error = outcome(PRUNE, FACTOR)
    assert [node.name for node in descended(after, "spatial")] == ["spatial:down", "spatial:core", "spatial"]
    assert after.params["spatial:core.weight"].shape == (8, 8, 3, 3)
    assert error < 0.02


@pytest.mark.parametrize(("last", "limit"), [(Quantize(LAYERS), 0.05), (ShareWeights(LAYERS, 6), 0.05)], ids=str)
def test_prune_then_factor_then_compress_the_factors(last: Pass, limit: float) -> None:
    after, error = outcome(PRUNE, FACTOR, last)
    for name in ("spatial:down", "spatial:core", "spatial", "pointwise:down", "pointwise", "fc:down", "fc"):
        weight = after.producer[after.node[name].inputs[1]]
        assert weight.op in ("DequantizeLinear", "Reshape"), name
    assert error < limit
