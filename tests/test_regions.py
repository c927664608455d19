"""Regions: what fuses into one kernel, and the work that cost models price."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.analysis.regions import Region, regions
from hwopt.analysis.workload import workloads
from hwopt.io.proto import from_model
from hwopt.ir import Graph


def graph_of(text: str) -> Graph:
    """A Graph from ONNX's textual form; float initializers may be left to `= {}`-less value lists."""
    return from_model(parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + text))


def conv_graph(tail: str, output: str = "float[1,4,6,6] y") -> Graph:
    return graph_of(f"""agraph (float[1,3,6,6] x, float[1,4,6,6] r, float[1,4,1,1] g) => ({output})
    <float[4,3,3,3] w = {{{",".join(["0.1"] * 108)}}}, float[1,4,1,1] c = {{1,2,3,4}}, float s = {{0.1}}, uint8 z = {{128}},
     float root = {{1.41421356}}, float one = {{1}}, float half = {{0.5}}>
    {{ h = Conv <pads = [1,1,1,1]> (x, w)
       {tail} }}""")


GELU = ["Div", "Erf", "Add", "Mul", "Mul"]


def ops(region: Region) -> list[str]:
    return [node.op for node in region.nodes]


@pytest.mark.parametrize(
    ("tail", "fused"),
    [
        ("y = Relu(h)", ["Conv", "Relu"]),
        ("a = Add(h, c) y = Clip(a)", ["Conv", "Add", "Clip"]),
        ("a = Add(r, h) y = Relu(a)", ["Conv", "Add", "Relu"]),
        ("y = Mul(g, h)", ["Conv", "Mul"]),
        ("a = Sigmoid(h) y = Mul(h, a)", ["Conv", "Sigmoid", "Mul"]),
        ("b = Mul(s, h) a = Sigmoid(b) y = Mul(h, a)", ["Conv", "Mul", "Sigmoid", "Mul"]),  # CLIP's quick GELU
        (
            "d = Div(h, root) e = Erf(d) p = Add(e, one) m = Mul(h, p) y = Mul(m, half)",
            ["Conv", "Div", "Erf", "Add", "Mul", "Mul"],
        ),
        ("a = Relu(h) y = Sub(c, a)", ["Conv", "Relu"]),  # c - a is no step of a kernel template
        ("y = Softmax(h)", ["Conv"]),
    ],
)
def test_epilogue_is_absorbed_behind_a_convolution(tail: str, fused: list[str]) -> None:
    assert ops(regions(conv_graph(tail))[0]) == fused


def test_a_value_with_two_readers_ends_the_region() -> None:
    found = regions(conv_graph("a = Relu(h) y = Add(a, h)"))
    assert [ops(region) for region in found] == [["Conv"], ["Relu", "Add"]]


def test_quantization_behind_the_activation_is_absorbed() -> None:
    graph = conv_graph("a = Relu(h) y = QuantizeLinear(a, s, z)", "uint8[1,4,6,6] y")
    (region,) = regions(graph)
    assert ops(region) == ["Conv", "Relu", "QuantizeLinear"]
    assert not region.integer


QDQ = """agraph (uint8[1,3,6,6] x, uint8[1,4,6,6] r) => (uint8[1,4,6,6] y)
    <int8[4,3,1,1] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4] ws = {0.1,0.2,0.3,0.4}, int8[4] wz = {0,0,0,0},
     int32[4] b = {1,2,3,4}, int32[4] bz = {0,0,0,0}, float s = {0.1}, uint8 z = {128}>
    { xf = DequantizeLinear(x, s, z)
      wf = DequantizeLinear <axis = 0> (w, ws, wz)
      bf = DequantizeLinear <axis = 0> (b, ws, bz)
      h = Conv(xf, wf, bf)
      rf = DequantizeLinear(r, s, z)
      a = Add(h, rf)
      y = QuantizeLinear(a, s, z) }"""


def test_quantized_convolution_reads_and_writes_integers_only() -> None:
    graph = graph_of(QDQ)
    (region,) = regions(graph)
    assert region.integer
    assert len(region.nodes) == len(graph.nodes)
    assert {"x", "r", "w", "b"} <= set(region.inputs)
    assert not {"xf", "wf", "bf", "rf"} & set(region.inputs)


def test_a_dequantized_value_that_others_need_stays_in_float_for_them() -> None:
    text = QDQ.replace("=> (uint8[1,4,6,6] y)", "=> (uint8[1,4,6,6] y, float[1,3,6,6] t)").replace(
        "h = Conv", "t = Softmax(xf) h = Conv"
    )
    found = {region.name: region for region in regions(graph_of(text))}
    conv = next(region for region in found.values() if region.kind == "conv")
    assert "x" in conv.inputs
    assert any(ops(region) == ["DequantizeLinear"] for region in found.values())


def test_every_node_is_in_one_region_and_regions_run_in_order() -> None:
    graph = graph_of(QDQ)
    found = regions(graph)
    names = [node.name for region in found for node in region.nodes]
    assert sorted(names) == sorted(node.name for node in graph.nodes)
    known = {*graph.inputs, *graph.params}
    for region in found:
        assert known.issuperset(region.inputs)
        known.update(region.outputs)


def test_workload_of_a_quantized_convolution() -> None:
    (work,) = workloads(graph_of(QDQ))
    assert (work.kind, work.dtype, work.m, work.n, work.k, work.groups) == ("conv", "int8", 36, 4, 3, 1)
    assert work.macs == 36 * 4 * 3
    assert work.read_bytes == 3 * 36 + 4 * 36
    assert work.write_bytes == 4 * 36
    assert work.weight_bytes >= 12 + 16


def test_workload_of_a_batched_matmul_and_a_free_reshape() -> None:
    graph = graph_of("""agraph (float[2,4,8,16] a, float[2,4,16,8] b) => (float[64,8] y)
    <int64[2] shape = {64, 8}> { m = MatMul(a, b) r = Relu(m) t = Reshape(r, shape) y = Tanh(t) }""")
    work = workloads(graph)
    assert [one.kind for one in work] == ["matmul", "elementwise"]
    assert (work[0].m, work[0].n, work[0].k, work[0].groups) == (8, 8, 16, 8)
    assert work[0].macs == int(np.prod([2, 4, 8, 8, 16]))


def test_codebook_weights_count_as_the_kernel_reads_them() -> None:
    from hwopt.pipeline import Context, parse
    from hwopt.plugins import find_passes
    from tests.test_compiler import small_net

    graph = small_net()
    shared = parse("share-weights{site=third,bits=4,sensitivity=uniform}", find_passes()).run(graph, Context())
    assert shared is not graph
    before, after = ({work.name: work.weight_bytes for work in workloads(g)} for g in (graph, shared))
    assert 0 <= after["third"] - before["third"] <= 64 * 4  # a bias that corrects the mean may have been added
