"""Kernels without products whose rows fill no whole vectors: results against ONNX Runtime, and vectors all the same."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, checker, helper, numpy_helper, parser

from hwopt.analysis.workload import workloads
from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.generic import scheduled
from hwopt.backends.tvm.learn.counted import steps_of
from hwopt.backends.tvm.learn.networks import GLUE, random_network
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target


def gather(rows: int) -> Graph:
    table = numpy_helper.from_array(np.zeros((rows, 24), np.float32), "t")
    indices = helper.make_tensor_value_info("i", TensorProto.INT64, (3,))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, (3, 24))
    graph = helper.make_graph([helper.make_node("Gather", ["t", "i"], ["y"], name="g")], "g", [indices], [result], [table])
    return from_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_rows_that_fill_no_vectors_are_gathered(dtype: str) -> None:
    text = "g (float[1,40,24] x) => (float[1,3,24] y) { r = Relu(x) y = Gather<axis = 1>(r, i) }"
    model = parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + text)
    model.graph.initializer.append(numpy_helper.from_array(np.array([3, 39, 2], dtype), "i"))
    graph, feeds = from_model(model), {"x": np.random.default_rng(1).normal(size=(1, 40, 24)).astype(np.float32)}
    found = run_program(compile_program(graph, find_target("host"), 1, "test"), feeds)
    assert np.array_equal(found["y"], ort.run(graph, feeds)["y"])


def test_loops_over_64_bits_are_cut_such_that_vectors_need_no_condition() -> None:
    import tvm
    from tvm import te, tirx

    rows, columns = (tirx.IntImm("int64", size) for size in (8, 40))
    data = te.placeholder((rows, columns), "float32", name="data")
    result = te.compute((rows, columns), lambda i, j: data[i, j] * tirx.const(2.0, "float32"), name="result")
    function = scheduled(te.create_prim_func([data, result]), 1).with_attr("global_symbol", "main")
    built = tvm.tirx.build(tvm.IRModule({"main": function}), target=tvm.target.Target(dict(find_target("x86-64-v3").tvm)))
    assert "vmaskmov" not in built.inspect_source("asm")
    assert "vgather" not in built.inspect_source("asm")


def test_of_a_table_a_gather_reads_the_rows_that_are_asked_for() -> None:
    small, large = (workloads(gather(rows))[0] for rows in (40, 4000))
    assert small.weight_bytes == large.weight_bytes == 3 * 24 * 4


@pytest.mark.parametrize("family", GLUE)
def test_networks_of_kernels_between_products_are_valid(family: str) -> None:
    for seed in range(12):
        checker.check_model(random_network(seed, family)[0], full_check=True)


def test_a_gate_with_a_scale_behind_it_counts_apart() -> None:
    assert steps_of(["HardSwish", "QuantizeLinear"]).scaled == 0
    assert steps_of(["HardSwish", "Mul", "Add", "QuantizeLinear"]).scaled == 1
