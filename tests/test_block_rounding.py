"""Block reconstruction: a block's outputs come nearer to the float model's than with AdaRound layer by layer."""

from __future__ import annotations

import sys
from types import MappingProxyType

import numpy as np
import pytest

from hwopt.backends.ort import run
from hwopt.errors import ToolchainError
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from passes._blocks import Block, blocks

torch_backend = pytest.importorskip("hwopt.backends.torch")
from passes._reconstruct_torch import _importance  # noqa: E402

HOST = find_target("host")


def conv(name: str, read: str, weight: str, group: int = 1) -> Node:
    pads = (1, 1, 1, 1) if weight.startswith("k") else (0, 0, 0, 0)
    return Node("Conv", (read, weight, f"{weight}_b"), (f"{name}_out",), name, MappingProxyType({"group": group, "pads": pads}))


def network(act: str = "Relu") -> Graph:
    """stem -> Relu -> inverted residual (expand, depthwise, project, Add) -> 1 x 1 head, 12 x 12 pixels throughout."""
    random = np.random.default_rng(0)
    shapes = {"k1": (8, 3, 3, 3), "w2": (24, 8, 1, 1), "k3": (24, 1, 3, 3), "w4": (8, 24, 1, 1), "w5": (6, 8, 1, 1)}
    params = {name: random.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}
    params |= {f"{name}_b": random.standard_normal(shape[0]) / 4 for name, shape in shapes.items()}
    nodes = (
        conv("stem", "x", "k1"), Node("Relu", ("stem_out",), ("r",), "relu"),
        conv("expand", "r", "w2"), Node(act, ("expand_out",), ("s",), "relu2"), conv("deep", "s", "k3", 24),
        Node("Relu", ("deep_out",), ("t",), "relu3"), conv("project", "t", "w4"),
        Node("Add", ("r", "project_out"), ("a",), "add"), conv("head", "a", "w5"),
    )  # fmt: skip
    held = MappingProxyType({name: frozen(array.astype(np.float32)) for name, array in params.items()})
    types = MappingProxyType({"x": TensorType("float32", (1, 3, 12, 12))})
    return infer_types(Graph("net", ("x",), ("head_out",), nodes, types, held, {"": 21}))


def pictures(seed: int, count: int) -> np.ndarray:
    """Smooth, as pictures are."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((count, 3, 4, 4)).repeat(3, 2).repeat(3, 3)
    return (coarse + 0.3 * random.standard_normal(coarse.shape)).astype(np.float32)


def quantized(rounding: str, graph: Graph, ctx: Context) -> Graph:
    return parse(f"quantize{{weights=int4,rounding={rounding}}}", find_passes()).run(graph, ctx)


def context() -> Context:
    return Context(target=HOST, calibration=Samples({"x": pictures(1, 48)}))


def error(graph: Graph, after: Graph) -> float:
    """For pictures that nothing was chosen by."""
    images = pictures(2, 24)
    pairs = [[run(one, {"x": image[None]})["head_out"] for one in (graph, after)] for image in images]
    return float(np.mean([np.square(found - want).mean() for want, found in pairs]))


def test_a_block_ends_where_one_value_goes_on() -> None:
    graph = network()
    names = [node.name for node in graph.nodes if node.op == "Conv"]
    found = list(blocks(graph, graph, names))
    assert found == [Block(("stem",), "relu"), Block(("expand", "deep", "project"), "add"), Block(("head",), "head")]


def test_outputs_are_nearer_than_with_adaround_and_only_integers_change() -> None:
    graph, one, other = network(), context(), context()
    adapted, block = quantized("adaround", graph, one), quantized("block", graph, other)
    assert error(graph, block) < 0.95 * error(graph, adapted)
    changed = {name for name in block.params if not np.array_equal(block.params[name], adapted.params[name])}
    assert {"w2_int4", "k3_int4"} <= changed
    assert all(name.endswith(("_int4", "_int32")) for name in changed)
    assert quantized("block", graph, other).digest == block.digest


def test_errors_count_by_the_mean_square_of_the_gradient() -> None:
    graph = network()
    found = _importance(graph, ["add", "head"], Samples({"x": pictures(3, 8)}))
    np.testing.assert_allclose(found["head"], 1.0, rtol=1e-5)  # of outputs that are values all elements count alike
    through = np.square(graph.params["w5"][:, :, 0, 0]).sum(0)  # and what the head multiplies by its weights' squares
    np.testing.assert_allclose(found["add"].mean((0, 2, 3)), through / through.mean(), rtol=0.1)


def test_blocks_without_gradients_are_rounded_layer_by_layer_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, ctx = network("Erf"), context()
    monkeypatch.delitem(torch_backend.RULES, "Erf")
    after = quantized("block", graph, ctx)
    assert [(one.site, "Erf" in one.reason) for one in ctx.refused] == [("expand", True)]
    assert error(graph, after) < error(graph, quantized("nearest", graph, context()))


def test_without_torch_the_next_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "passes._reconstruct_torch", None)
    with pytest.raises(ToolchainError, match="rounding=adaround"):
        quantized("block", network(), context())
