"""Kernels know their regions, also where TVM fuses and orders them: exact names are what prices are learned from."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from hwopt.analysis.workload import workloads
from hwopt.backends.tvm.build import reading
from hwopt.backends.tvm.learn.measure import assigned, owners_of
from hwopt.io.proto import from_model
from hwopt.plugins import find_target

SHAPE = (1, 8, 6, 6)


def graph_of(*nodes, out: tuple[int, ...] = SHAPE):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", SHAPE), ("y", out))]
    weights = [numpy_helper.from_array(np.ones((8, 8, 1, 1), np.float32), "w")]
    made = [helper.make_node(op, ins, [to], name=name, **more) for name, op, ins, to, more in nodes]
    return from_model(helper.make_model(helper.make_graph(made, "g", ends[:1], ends[1:], weights), ir_version=10))


def calls_of(graph):
    return reading(graph, find_target("x86-64-v2")).calls


CONV = ("first", "Conv", ["x", "w"], "a", {})


def test_kernels_between_templates_are_their_regions_and_the_input_s_layout_is_nobody_s() -> None:
    graph = graph_of(
        CONV, ("pool", "MaxPool", ["a"], "b", {"kernel_shape": [3, 3], "pads": [1] * 4}), ("neg", "Neg", ["a"], "c", {}),
        ("abs", "Abs", ["b"], "d", {}), ("last", "Conv", ["d", "w"], "e", {}), ("sum", "Add", ["e", "c"], "f", {}),
        ("end", "Relu", ["f"], "y", {}),
    )  # fmt: skip
    calls = calls_of(graph)
    owners = owners_of(calls)
    assert owners[0] == () and calls[0].regions == ("first",)
    assert {region for some in owners for region in some} >= {"first", "pool", "neg", "last"}
    samples, other = assigned(workloads(graph), owners, np.arange(1.0, len(calls) + 1), np.zeros(len(calls)))
    assert other == 1.0
    assert sum(one.seconds for one in samples) + other == pytest.approx(sum(range(1, len(calls) + 1)))


def test_a_kernel_of_several_regions_names_them_all() -> None:
    graph = graph_of(
        CONV, ("mean", "GlobalAveragePool", ["a"], "b", {}), ("gate", "Sigmoid", ["b"], "c", {}),
        ("scaled", "Mul", ["a", "c"], "d", {}), ("last", "Conv", ["d", "w"], "y", {}),
    )  # fmt: skip
    owners = owners_of(calls_of(graph))
    assert {region for some in owners for region in some} == {"first", "last", "mean", "gate", "scaled"}
    assert all(some[:1] == ("last",) or "last" not in some for some in owners)


def test_a_transposition_that_waits_for_its_reader_stays_its_own_region_s() -> None:
    graph = graph_of(
        CONV, ("turned", "Transpose", ["a"], "b", {"perm": [0, 2, 3, 1]}), ("end", "Softmax", ["b"], "c", {"axis": -1}),
        ("back", "Transpose", ["c"], "d", {"perm": [0, 2, 1, 3]}), ("out", "Neg", ["d"], "y", {}), out=(1, 6, 6, 8),
    )  # fmt: skip
    calls = calls_of(graph)
    assert [call.regions for call in calls if "back" in call.regions]
    assert all(call.regions == ("end",) for call in calls if call.label == "end")


def test_workloads_say_axes_and_forms_of_operands_of_what_is_no_product() -> None:
    graph = graph_of(
        CONV, ("joined", "Concat", ["a", "a"], "b", {"axis": -2}), ("cut", "MaxPool", ["b"], "c", {"kernel_shape": [7, 1]}),
        ("twice", "Mul", ["c", "c"], "d", {}), ("turned", "Transpose", ["d"], "e", {}),
        ("last", "Softmax", ["e"], "y", {"axis": 1}), out=(6, 6, 8, 1),
    )  # fmt: skip
    steps = {work.name: work.steps for work in workloads(graph)}
    assert steps["first"] == ("Conv",) and steps["joined"] == ("Concat 2",) and steps["twice"] == ("Mul full",)
    assert steps["turned"] == ("Transpose 3,2,1,0",) and steps["last"] == ("Softmax 1",)


def test_a_softmax_behind_a_sum_runs_in_the_name_of_their_region() -> None:
    window = {"kernel_shape": [3, 3], "pads": [1] * 4}
    graph = graph_of(
        CONV, ("one", "MaxPool", ["a"], "b", window), ("other", "AveragePool", ["a"], "c", window),
        ("sum", "Add", ["b", "c"], "d", {}), ("end", "Softmax", ["d"], "e", {"axis": -1}), ("out", "Exp", ["e"], "y", {}),
    )  # fmt: skip
    calls = calls_of(graph)
    samples, _ = assigned(workloads(graph), owners_of(calls), np.ones(len(calls)), np.zeros(len(calls)))
    (found,) = (one for one in samples if one.work.name == "sum")
    assert len(found.work.steps) == 2 and found.seconds >= 1 and found.shared == 1
    assert any(call.label == "sum" for call in calls)
