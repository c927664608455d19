"""How the data of kernels lie that only move them, as their prices count it and as the backend emits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from hwopt.analysis.workload import workloads
from hwopt.backends.tvm.build import reading
from hwopt.backends.tvm.learn.counted_loops import loops
from hwopt.backends.tvm.learn.counted_moves import Move
from hwopt.backends.tvm.learn.predictor import fitted
from hwopt.backends.tvm.learn.table import work_key
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target
from hwopt.target import Workload


@pytest.fixture
def image() -> Callable[[bool], Graph]:
    """A Concat and a Transpose of an image that a convolution made; before them a Reshape may read it, in ONNX's order."""

    def make(reshaped: bool) -> Graph:
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")]
        if reshaped:
            nodes += [
                helper.make_node("Reshape", ["y", "flat"], ["r"], name="view"),
                helper.make_node("Softmax", ["r"], ["s"], name="soft"),
            ]
        nodes += [
            helper.make_node("Concat", ["y", "y"], ["joined"], name="concat", axis=1),
            helper.make_node("Conv", ["joined", "v"], ["z"], name="behind"),
            helper.make_node("Transpose", ["y"], ["t"], name="turn", perm=[0, 2, 3, 1]),
        ]
        outputs = [*(["s"] if reshaped else []), "z", "t"]
        params = {"w": np.ones((24, 3, 1, 1), np.float32), "v": np.ones((8, 48, 1, 1), np.float32), "flat": np.array([1, 24, 64])}
        graph = helper.make_graph(
            nodes, "image", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in params.items()],
        )  # fmt: skip
        return from_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))

    return make


def concat_of(graph: Graph) -> Workload:
    return next(work for work in workloads(graph) if work.steps[0].startswith("Concat"))


@pytest.mark.parametrize(("reshaped", "order"), [(False, "last of 24"), (True, "first last of 24")])
def test_a_concat_reads_channels_first_where_a_reshape_did_so_before(
    image: Callable[[bool], Graph], reshaped: bool, order: str
) -> None:
    assert concat_of(image(reshaped)).order == order


@pytest.mark.parametrize("reshaped", [False, True])
def test_the_backend_reads_in_the_order_that_is_counted(image: Callable[[bool], Graph], reshaped: bool) -> None:
    graph = image(reshaped)
    found = reading(graph, find_target("x86-64-v2"), 1)
    call = next(one for one in found.calls if "concat" in one.regions and one.label not in one.regions)
    function = found.functions[call.symbol]
    source = [int(dim) for dim in function.params[0].shape]
    assert source == ([1, 24, 8, 8] if concat_of(graph).order.startswith("first") else [1, 8, 8, 24])


def test_elements_that_are_gathered_count_as_such(image: Callable[[bool], Graph]) -> None:
    near, far = (loops(concat_of(image(reshaped)), 1).times["strided"] for reshaped in (False, True))
    assert (near, far) == (0.0, 48 * 64)


def move(order: str, step: str = "Transpose 0,2,1", dims: tuple[int, ...] = (1, 64, 100)) -> Workload:
    size = 4 * int(np.prod(dims))
    return Workload("t", "move", "float32", read_bytes=size, write_bytes=size, dims=dims, steps=(step,), order=order)


def test_matrices_are_turned_by_squares_unless_a_view_is_part_of_the_loop() -> None:
    assert Move(move("first first")).turned == (1, 100, 64)
    assert Move(move("first first view")).turned == (0, 0, 0)
    assert (loops(move("first first"), 1).family, loops(move("first first view"), 1).family) == ("turned", "transposed")


def test_prices_of_differently_lying_data_have_other_keys_and_all_others_keep_theirs() -> None:
    assert work_key(move("first"), 1) != work_key(move("last"), 1)
    plain = move("")
    assert "order" in dataclasses.asdict(plain) and work_key(plain, 1) == "ef8c6017ee302aa6"


def test_moves_are_priced_by_their_counts_alone() -> None:
    found = [loops(move("first first", dims=(1, 8 * n, 96)), 1) for n in range(1, 25)]
    seconds = np.array([1e-9 * one.times["squares"] + 1e-7 for one in found])
    model = fitted(found, [1] * len(found), seconds, np.zeros(len(found)))
    mean, half = model.predict(found[7], 1)
    guess = model.families["turned x1"].guess(np.array([list(found[7].times.values())]))
    assert mean == pytest.approx(float(np.log(guess[0]))) and half > 0
