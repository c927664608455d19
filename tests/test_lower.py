"""Lowering to TVM: results against ONNX Runtime, integer kernels all the way, layouts, errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program, fused, named, object_code, reading
from hwopt.backends.tvm.lower import lower
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.support import unsupported
from hwopt.backends.tvm.vm import Machine, compile_vm, reasons
from hwopt.errors import UnsupportedError
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target


def graph_of(text: str) -> Graph:
    return from_model(parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + text))


def values(shape: tuple[int, ...], seed: int, dtype: str) -> np.ndarray:
    random = np.random.default_rng(seed)
    if dtype.startswith("float"):
        return random.normal(size=shape).astype(dtype)
    low, high = (0, 2) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max + 1) if "8" in dtype else (0, 8)
    return random.integers(low, high, shape).astype(dtype)


def compare(graph: Graph, tolerance: float = 1e-4) -> None:
    """Compiled outputs equal ONNX Runtime's: within `tolerance` of the largest for floats, within one for integers."""
    feeds = {name: values(graph.tensor(name).dims, i, graph.tensor(name).dtype) for i, name in enumerate(graph.inputs)}
    expected = ort.run(graph, feeds)
    found = run_program(compile_program(graph, find_target("host"), 1, "test"), feeds)
    for name in graph.outputs:
        assert found[name].dtype == expected[name].dtype
        assert found[name].shape == expected[name].shape
        error = np.abs(found[name].astype(np.float64) - expected[name].astype(np.float64)).max(initial=0)
        limit = 1 if expected[name].dtype.kind in "iu" else tolerance * max(1.0, np.abs(expected[name]).max(initial=0))
        assert error <= limit, f"{name}: {error}"


def floats(count: int, seed: int) -> str:
    return ", ".join(f"{value:.4f}" for value in np.random.default_rng(seed).normal(size=count))


def integers(count: int, seed: int) -> str:
    return ", ".join(map(str, np.random.default_rng(seed).integers(-127, 128, count)))


CONV = f"float[8,3,3,3] w = {{{floats(216, 0)}}}, float[8] b = {{{floats(8, 1)}}}, float[8,1,3,3] d = {{{floats(72, 2)}}}"


@pytest.mark.parametrize(
    "body",
    [
        "h = Conv <pads = [1,1,1,1]> (x, w, b) y = Relu(h)",
        "h = Conv <pads = [1,1,1,1]> (x, w, b) s = Sigmoid(h) m = Mul(h, s) y = Add(m, r)",
        "h = Conv <pads = [0,1,2,1], strides = [1,1]> (x, w) p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (h) "
        "y = Add(p, r)",
        'h = Conv <auto_pad = "SAME_UPPER"> (x, w) c = Conv <group = 8, pads = [1,1,1,1]> (h, d) y = HardSwish(c)',
        "h = Conv <pads = [1,1,1,1]> (x, w) g = GlobalAveragePool(h) s = HardSigmoid(g) y = Mul(h, s)",
        "h = Conv <pads = [1,1,1,1]> (x, w) c = Concat <axis = 1> (h, r) y, z = Split <axis = 1, num_outputs = 2> (c)",
        "h = Conv <pads = [1,1,1,1]> (x, w) t = Transpose <perm = [0,2,3,1]> (h) s = Softmax(t) "
        "y = Transpose <perm = [0,3,1,2]> (s)",
    ],
)
def test_float_convolutions_and_what_is_around_them(body: str) -> None:
    compare(graph_of(f"agraph (float[1,3,9,7] x, float[1,8,9,7] r) => (float[1,8,9,7] y) <{CONV}> {{ {body} }}"))


@pytest.mark.parametrize(
    ("inputs", "output", "body"),
    [
        ("float[2,6,16] x, float[2,16,5] k", "float[2,6,5] y", "h = MatMul(x, k) y = Tanh(h)"),
        ("float[2,3,6,16] x, float[2,3,16,5] k", "float[2,3,6,5] y", "y = MatMul(x, k)"),
        ("float[4,16] x, float[16,5] k", "float[4,5] y", "h = MatMul(x, k) y = Softmax(h)"),
        ("float[16] x, float[16,5] k", "float[5] y", "y = MatMul(x, k)"),
        ("float[3,4,16] x, float[16,5] k", "float[3,4,5] y", "y = MatMul(x, k)"),
    ],
)
def test_matmuls_of_computed_operands(inputs: str, output: str, body: str) -> None:
    compare(graph_of(f"agraph ({inputs}) => ({output}) {{ {body} }}"))


@pytest.mark.parametrize("attributes", ["transB = 0", "alpha = 0.5, beta = 2.0", "transB = 1"])
def test_gemm(attributes: str) -> None:
    shape = "[6,16]" if "transB = 1" in attributes else "[16,6]"
    weights = f"<float{shape} w = {{{floats(96, 3)}}}, float[6] b = {{{floats(6, 4)}}}>"
    compare(graph_of(f"agraph (float[4,16] x) => (float[4,6] y) {weights} {{ y = Gemm <{attributes}> (x, w, b) }}"))


QUANTIZED = (
    "float s = {0.05}, uint8 z = {120}, float t = {0.07}, uint8 v = {3}, float q = {0.031}, int8 n = {-4}, "
    f"int8[8,4,3,3] w = {{{integers(288, 5)}}}, float[8] ws = {{0.01,0.02,0.03,0.01,0.02,0.03,0.01,0.02}}, "
    f"int8[8] wz = {{0,0,0,0,0,0,0,0}}, int32[8] b = {{{integers(8, 6)}}}, int32[8] bz = {{0,0,0,0,0,0,0,0}}, "
    f"int8[8,1,3,3] d = {{{integers(72, 7)}}}, int8[8,16] g = {{{integers(128, 8)}}}, int64[2] image = {{2,3}}, "
    "float low = {-0.5}, float high = {6}"
)
WEIGHTS = (
    "xf = DequantizeLinear(x, s, z) rf = DequantizeLinear(r, t, v) wf = DequantizeLinear <axis = 0> (w, ws, wz) "
    "bf = DequantizeLinear <axis = 0> (b, ws, bz) df = DequantizeLinear <axis = 0> (d, ws, wz) "
)
QUANTIZED_BODIES = [
    "h = Conv <pads = [1,1,1,1]> (xf, wf, bf) y = QuantizeLinear(h, t, v)",
    "h = Conv <pads = [1,1,1,1]> (xf, wf, bf) c = Relu(h) y = QuantizeLinear(c, t, v)",
    "h = Conv <pads = [1,1,1,1]> (xf, wf) a = Add(h, rf) c = Clip(a, low, high) y = QuantizeLinear(c, t, v)",
    "h = Conv <pads = [1,1,1,1], group = 8> (rf, df, bf) y = QuantizeLinear(h, s, z)",
    "h = Conv <pads = [1,1,1,1]> (xf, wf, bf) k = HardSwish(h) y = QuantizeLinear(k, t, v)",
    "a = Add(rf, rf) y = QuantizeLinear(a, t, v)",
    "k = Mul(rf, rf) y = QuantizeLinear(k, s, z)",
    "a = MaxPool <kernel_shape = [2,2], pads = [0,0,1,1]> (rf) y = QuantizeLinear(a, t, v)",
    "a = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (rf) y = QuantizeLinear(a, s, z)",
    "a = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (rf) y = QuantizeLinear(a, s, z)",
    "a = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (rf) y = QuantizeLinear(a, t, v)",
]


@pytest.mark.parametrize("body", QUANTIZED_BODIES)
def test_quantized_regions_are_within_one_step(body: str) -> None:
    compare(quantized(body))


def quantized(body: str, output: str = "uint8[1,8,6,5] y") -> Graph:
    head = f"agraph (uint8[1,4,6,5] x, uint8[1,8,6,5] r) => ({output}) <{QUANTIZED}>"
    return graph_of(f"{head} {{ {WEIGHTS} {body} }}")


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ("c = Concat <axis = 1> (xf, rf) y = QuantizeLinear(c, t, v)", "uint8[1,12,6,5] y"),
        ("c = Flatten(rf) y = QuantizeLinear(c, t, v)", "uint8[1,240] y"),
        ("c = Transpose <perm = [0,2,3,1]> (rf) y = QuantizeLinear(c, s, z)", "uint8[1,6,5,8] y"),
        ("a = GlobalAveragePool(rf) y = QuantizeLinear(a, s, z)", "uint8[1,8,1,1] y"),
        ("a = ReduceMean <keepdims = 0> (rf, image) y = QuantizeLinear(a, t, v)", "uint8[1,8] y"),
        ("c = Relu(xf) y = QuantizeLinear(c, q, n)", "int8[1,4,6,5] y"),
        ("c = Sub(xf, xf) y = QuantizeLinear(c, q, n)", "int8[1,4,6,5] y"),
    ],
)
def test_quantized_moves_and_reductions(body: str, output: str) -> None:
    compare(quantized(body, output))


def test_quantized_fully_connected_layer() -> None:
    compare(
        graph_of(f"""agraph (uint8[3,8] x) => (uint8[3,16] y) <{QUANTIZED}> {{
        xf = DequantizeLinear(x, s, z) m = Constant <value = float[1] {{0.02}}> () k = Constant <value = int8[1] {{0}}> ()
        gf = DequantizeLinear(g, q) h = MatMul(xf, gf) y = QuantizeLinear(h, t, v) }}""")
    )


def test_no_float_quantization_is_left_in_a_quantized_network() -> None:
    graph = quantized(
        "h = Conv <pads = [1,1,1,1]> (xf, wf, bf) c = Relu(h) hq = QuantizeLinear(c, t, v) hf = DequantizeLinear(hq, t, v) "
        "a = Add(hf, rf) aq = QuantizeLinear(a, t, v) af = DequantizeLinear(aq, t, v) "
        "e = Conv <pads = [1,1,1,1], group = 8> (af, df) eq = QuantizeLinear(e, s, z) ef = DequantizeLinear(eq, s, z) "
        "m = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (ef) y = QuantizeLinear(m, t, v)"
    )
    host = find_target("host")
    module = fused(lower(graph, host, 1), host, 1)
    assert "quantize(" not in str(module["main"]), "no operator is left that TVM would lower to float arithmetic"
    kernels = {v.name_hint: str(f) for v, f in module.functions.items() if v.name_hint != "main"}
    others = [text for name, text in kernels.items() if not name.startswith("kernel_")]
    assert len(kernels) - len(others) == 3, "two convolutions and a pool, each one kernel with all that is behind it"
    for text in others:  # the residual add, the pool, and transpositions at the borders
        assert "float" not in text
    for name in ("kernel_0", "kernel_1"):
        assert not re.search(r'T.Cast\("float32\w*", (data|weights)\[', kernels[name]), "operands are multiplied as integers"
        assert re.search(r"int32\w*", kernels[name])
    compare(graph)


def test_equal_kernels_have_equal_bytes() -> None:
    host = find_target("host")
    builds = [named(reading(quantized(QUANTIZED_BODIES[0]), host), "same") for _ in range(2)]
    first, second = ({s: object_code({s: f}, host.tvm, host.name) for s, f in functions.items()} for _, functions in builds)
    assert first == second
    assert builds[0][0].calls == builds[1][0].calls


def test_kernels_that_differ_anywhere_are_compiled_apart() -> None:
    host, other = find_target("host"), find_target("cortex-a72")
    text = "agraph (float[1,8] x) => (float[1,8] y) {{ y = LeakyRelu <alpha = {}> (x) }}"
    objects = [compile_program(graph_of(text.format(alpha)), host, 1, "one").objects for alpha in (0.1, 0.2, 0.1)]
    assert objects[0] == objects[2]
    assert objects[0] != objects[1]
    assert compile_program(graph_of(text.format(0.1)), other, 1, "one").objects != objects[0]


@pytest.mark.parametrize(
    "text",
    [
        "agraph (float[2,3] x) => (float[2,3] x2, float[6] y) <int64[1] s = {-1}> { x2 = Identity(x) y = Reshape(x, s) }",
        "agraph (float[2,3] x) => (float[2,3] y, float[2,3] z) { y = Relu(x) z = Identity(y) }",
        "agraph (float[2,3] x) => (float[2,3] y, float[6] z) <int64[1] s = {-1}> { y = Relu(x) z = Reshape(y, s) }",
        "agraph (float[2,3] x) => (float[2] y) <float[2] c = {1, 2}> { y = Identity(c) }",
    ],
)
def test_outputs_that_are_other_buffers_get_their_own(text: str) -> None:
    compare(graph_of(text))


def test_unsupported_nodes_are_all_named() -> None:
    head = '<ir_version: 10, opset_import: ["" : 21, "com.acme" : 1]>'
    model = parser.parse_model(
        head
        + """agraph (float[3,1,4] x, float[1,8,4] w, float[1,8,2] r) => (float[3,1,1,2] y, float[1,2] d)
    { y = LSTM <hidden_size = 2> (x, w, r) d = com.acme.Thing(x) }"""
    )
    graph = from_model(model)
    assert [node.op for node, _ in unsupported(graph)] == ["LSTM", "Thing"]
    with pytest.raises(UnsupportedError, match=r"LSTM.*Thing") as caught:
        compile_program(graph, find_target("host"))
    assert all(node.name in str(caught.value) for node in graph.nodes)


def test_models_in_integers_are_refused_with_the_way_out_and_a_message_of_a_readable_length() -> None:
    layers = " ".join(f"y{i} = ConvInteger(x, w)" for i in range(20))
    outputs = ", ".join(f"int32[1,1,3,3] y{i}" for i in range(20))
    graph = graph_of(f"agraph (uint8[1,1,3,3] x) => ({outputs}) <uint8[1,1,1,1] w = {{3}}> {{ {layers} }}")
    with pytest.raises(UnsupportedError, match=r"give the float model.*and 12 more"):
        compile_program(graph, find_target("host"))


def test_operators_that_need_the_runtime_are_refused_with_the_way_out() -> None:
    graph = graph_of("agraph (int64[4,8] x) => (int64[4,3] y, int64[4,3] i) <int64[1] k = {3}> { y, i = TopK(x, k) }")
    with pytest.raises(UnsupportedError, match="sorts; compile it for the Relax VM"):
        compile_program(graph, find_target("host"))


def test_demo_model() -> None:
    model = onnx.load(Path(__file__).parent.parent / "hwopt" / "demo" / "fashion.onnx")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = 2
    graph = from_model(model)
    compare(graph)
    program = compile_program(graph, find_target("host"), 1, "demo")
    assert all("transpose" not in call.label for call in program.calls), "channels last from end to end"


@pytest.mark.parametrize("body", [QUANTIZED_BODIES[2], "h = Conv <pads = [1,1,1,1], group = 8> (rf, df, bf) y = Relu(h)"])
def test_kernels_are_built_for_other_machines(body: str) -> None:
    output = "float[1,8,6,5] y" if "y = Relu" in body else "uint8[1,8,6,5] y"
    program = compile_program(quantized(body, output), find_target("cortex-a72"), 1, "arm")
    assert all(data[:4] == b"\x7fELF" and data[18] == 183 for data in program.objects), "EM_AARCH64 is 183"


def test_a_machine_without_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no kernels yet"):
        compile_program(quantized(QUANTIZED_BODIES[0]), find_target("nvidia-t4"))


def test_threads_change_nothing_in_the_results() -> None:
    graph = graph_of(f"""agraph (float[1,3,40,40] x) => (float[1,8,40,40] y) <{CONV}> {{
    h = Conv <pads=[1,1,1,1]> (x, w, b) y = Exp(h) }}""")
    feeds = {"x": values((1, 3, 40, 40), 0, "float32")}
    one, two = (run_program(compile_program(graph, find_target("host"), n), feeds)["y"] for n in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "text",
    [
        "agraph (float[4,8] x) => (int64[4,3] y, int64[4,3] i) <int64[1] k = {3}>{ h = Cast <to = 7> (x) y, i = TopK(h, k) }",
        "agraph (float[n,8] x) => (float[n,8] y) { h = Relu(x) y = Softmax(h) }",
    ],
)
def test_the_virtual_machine_runs_what_the_driver_cannot(text: str) -> None:
    graph = graph_of(text)
    assert reasons(graph)
    feeds = {"x": values((4, 8), 0, "float32")}
    machine = Machine(compile_vm(graph, find_target("host")), graph.inputs, graph.outputs)
    for name, expected in ort.run(graph, feeds).items():
        np.testing.assert_allclose(machine.run(feeds)[name], expected, rtol=1e-5, atol=1e-6)
