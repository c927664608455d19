"""AdaRound: outputs are nearer to the float model's than with nearest rounding, nearly as near as any choice of up and down."""

from __future__ import annotations

import itertools
from types import MappingProxyType

import numpy as np
import pytest

from hwopt.backends.ort import run
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.errors import PassError
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from passes._adaround import _patches, best_rounding

HOST = find_target("host")


def network() -> Graph:
    """Conv (strided) -> Relu -> depthwise Conv -> Relu -> 1 x 1 Conv -> mean -> Gemm -> MatMul + bias."""
    random = np.random.default_rng(0)
    params = {
        "w1": random.standard_normal((16, 3, 3, 3)) / 5, "b1": random.standard_normal(16) / 4,
        "w2": random.standard_normal((16, 1, 3, 3)) / 3, "w3": random.standard_normal((24, 16, 1, 1)) / 4,
        "w4": random.standard_normal((32, 24)) / 5, "b4": random.standard_normal(32), "w5": random.standard_normal((32, 10)) / 6,
        "b5": random.standard_normal(10),
    }  # fmt: skip
    strided = MappingProxyType({"strides": (2, 2), "pads": (0, 0, 1, 1)})
    depthwise = MappingProxyType({"group": 16, "pads": (1, 1, 1, 1)})
    nodes = (
        Node("Conv", ("x", "w1", "b1"), ("a",), "one", strided), Node("Relu", ("a",), ("r",), "act"),
        Node("Conv", ("r", "w2"), ("c",), "two", depthwise), Node("Relu", ("c",), ("s",), "act2"),
        Node("Conv", ("s", "w3"), ("t",), "three"), Node("GlobalAveragePool", ("t",), ("p",), "pool"),
        Node("Flatten", ("p",), ("f",), "flat"),
        Node("Gemm", ("f", "w4", "b4"), ("g",), "four", MappingProxyType({"transB": 1, "alpha": 2.0})),
        Node("MatMul", ("g", "w5"), ("h",), "five"), Node("Add", ("h", "b5"), ("y",), "bias"),
    )  # fmt: skip
    held = MappingProxyType({name: frozen(array.astype(np.float32)) for name, array in params.items()})
    types = MappingProxyType({"x": TensorType("float32", (1, 3, 12, 12))})
    return infer_types(Graph("net", ("x",), ("y",), nodes, types, held, {"": 21}))


def pictures(seed: int, count: int) -> np.ndarray:
    """Smooth, as pictures are: neighbouring inputs of a convolution are related."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((count, 3, 4, 4)).repeat(3, 2).repeat(3, 3)
    return (coarse + 0.3 * random.standard_normal(coarse.shape)).astype(np.float32)


def quantized(options: str) -> Graph:
    ctx = Context(target=HOST, calibration=Samples({"x": pictures(1, 64)}))
    return parse(f"quantize{{{options}}}", find_passes()).run(network(), ctx)


def errors(after: Graph) -> np.ndarray:
    """Of every output for pictures that nothing was chosen by, [pictures, outputs]."""
    images = pictures(2, 40)
    pairs = [[run(graph, {"x": image[None]})["y"][0] for graph in (network(), after)] for image in images]
    return np.array([found - want for want, found in pairs])


@pytest.mark.parametrize(("weights", "better"), [("int4", 0.6), ("int8,reduce_range=false", 1.1)])
def test_outputs_are_nearer_to_the_float_models(weights: str, better: float) -> None:
    nearest, adapted = (errors(quantized(f"weights={weights},rounding={one}")) for one in ("nearest", "adaround"))
    assert np.square(adapted).mean() < better * np.square(nearest).mean()
    assert np.square(adapted.mean(0)).mean() < 0.2 * np.square(adapted).mean() + 1e-4


def test_the_same_data_give_the_same_bytes_and_kernels_compute_them() -> None:
    one, other = (quantized("weights=int4,rounding=adaround") for _ in range(2))
    assert one.digest == other.digest
    image = {"x": pictures(5, 1)}
    want = run(one, image)["y"]
    found = run_program(compile_program(one, HOST), image)["y"]
    assert np.abs(found - want).max() <= 0.02 * np.abs(want).max()


def test_sizes_and_scales_stay_those_of_nearest_rounding() -> None:
    nearest, adapted = (quantized(f"weights=int4,rounding={one}") for one in ("nearest", "adaround"))
    common = nearest.params.keys() & adapted.params.keys()
    changed = {name for name in common if not np.array_equal(adapted.params[name], nearest.params[name])}
    assert {"w1_int4", "w2_int4", "w3_int4", "w4_int4", "w5_int4", "b1_int32", "b4_int32"} <= changed
    assert all(name.endswith(("_int4", "_int32")) for name in changed)
    assert all(adapted.params[name].dtype == nearest.params[name].dtype for name in common)


def test_few_weights_are_rounded_nearly_as_well_as_by_the_best_choice_of_all() -> None:
    random = np.random.default_rng(3)
    exact = random.uniform(-5, 5, (20, 8))
    data = random.standard_normal((100, 3)) @ random.standard_normal((3, 8)) + 0.2 * random.standard_normal((100, 8))
    moment = data.T @ data / len(data)
    found = best_rounding(exact[None], moment[None], (exact @ moment)[None], np.rint(exact)[None], 7)[0]
    choices = np.array(list(itertools.product((0, 1), repeat=8)))

    best = np.array([min(error_of(exact[row], np.floor(exact[row]) + choices, moment)) for row in range(20)])
    assert error_of(exact, found, moment).sum() < 1.5 * best.sum()
    assert error_of(exact, found, moment).sum() < 0.3 * error_of(exact, np.rint(exact), moment).sum()


def error_of(exact: np.ndarray, steps: np.ndarray, moment: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("...k,kl,...l->...", steps - exact, moment, steps - exact))


@pytest.mark.parametrize("attrs", [
    {"strides": (2, 1), "pads": (0, 1, 2, 1)}, {"dilations": (2, 2), "group": 2}, {"group": 4, "pads": (1, 1, 1, 1)},
])  # fmt: skip
def test_patches_times_weights_are_the_convolution(attrs: dict[str, object]) -> None:
    random = np.random.default_rng(4)
    groups = int(attrs.get("group", 1))  # type: ignore[call-overload]
    weight = random.standard_normal((8, 4 // groups, 3, 3)).astype(np.float32)
    node = Node("Conv", ("x", "w"), ("y",), "conv", MappingProxyType(attrs))
    types = MappingProxyType({"x": TensorType("float32", (2, 4, 11, 12))})
    graph = infer_types(Graph("g", ("x",), ("y",), (node,), types, MappingProxyType({"w": frozen(weight)}), {"": 21}))
    data = random.standard_normal((2, 4, 11, 12)).astype(np.float32)
    inputs, outputs = _patches(node, data, run(graph, {"x": data})["y"], weight.shape)
    rows = weight.reshape(groups, 8 // groups, -1)
    np.testing.assert_allclose(np.einsum("rgk,gnk->rgn", inputs, rows), outputs, atol=1e-4)


@pytest.mark.parametrize("rounding", ["adaround", "block"])
def test_inputs_that_come_in_later_are_no_obstacle(rounding: str) -> None:
    """An embedding's mask, say, which the first layer does not read."""
    random = np.random.default_rng(3)
    params = {name: frozen(random.standard_normal((12, 12)).astype(np.float32)) for name in ("w1", "w2")}
    nodes = (
        Node("MatMul", ("x", "w1"), ("h",), "one"), Node("Mul", ("h", "mask"), ("m",), "masked"),
        Node("MatMul", ("m", "w2"), ("y",), "two"),
    )  # fmt: skip
    types = MappingProxyType({name: TensorType("float32", (1, 12)) for name in ("x", "mask")})
    graph = infer_types(Graph("masked", ("x", "mask"), ("y",), nodes, types, MappingProxyType(params), {"": 21}))
    data = {"x": random.standard_normal((64, 12)), "mask": random.random((64, 12)) > 0.5}
    samples = Samples({name: array.astype(np.float32) for name, array in data.items()})
    changed = [
        parse(f"quantize{{weights=int4,rounding={way}}}", find_passes()).run(graph, Context(HOST, samples))
        for way in ("nearest", rounding)
    ]
    errors = [
        sum(float(np.square(run(one, feeds)["y"] - run(graph, feeds)["y"]).sum()) for feeds in samples.feeds(graph))
        for one in changed
    ]
    assert errors[1] < errors[0]


def test_unknown_roundings_are_refused() -> None:
    with pytest.raises(PassError, match="adaround"):
        quantized("rounding=adaruond")
