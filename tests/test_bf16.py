"""bfloat16 as a precision: what the pass writes, what ONNX Runtime says to it, and what the kernels make of it."""

from __future__ import annotations

import dataclasses
import platform

import ml_dtypes
import numpy as np
import pytest
import tvm
from onnx import parser

from hwopt.analysis.regions import regions
from hwopt.analysis.size import weight_bytes
from hwopt.analysis.workload import workloads
from hwopt.backends import ort
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.build import compile_program, named, reading
from hwopt.backends.tvm.kernels.spec import MatmulSpec
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.tune import child
from hwopt.errors import PassError
from hwopt.io.proto import from_model, to_model
from hwopt.ir import Graph
from hwopt.pipeline import Context, Refusal, parse, run_pass
from hwopt.plugins import find_passes, find_target
from hwopt.target import Target
from passes.quantize import Quantize
from targets import _isa_arm, _isa_x86
from tests.random_graphs import random_samples

BF16 = Quantize(dtype="bf16")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def graph_of(text: str) -> Graph:
    return from_model(parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + text))


def floats(*shape: int, seed: int = 0) -> str:
    values = np.random.default_rng(seed).normal(size=int(np.prod(shape))) / max(1.0, np.sqrt(np.prod(shape[1:])))
    return f"float[{','.join(map(str, shape))}] {{}} = {{{{{', '.join(f'{value:.4f}' for value in values)}}}}}"


def weights(**shapes: tuple[int, ...]) -> str:
    return ", ".join(floats(*shape, seed=seed).format(name) for seed, (name, shape) in enumerate(shapes.items()))


CNN = f"""cnn (float[1,3,13,13] x) => (float[1,10] y)
<{weights(w1=(24, 3, 3, 3), b1=(24,), d=(24, 1, 3, 3), w2=(24, 24, 1, 1), w3=(20, 24, 3, 3), f=(10, 20), fb=(10,))}> {{
    a = Conv <pads = [1,1,1,1]> (x, w1, b1)
    r = Relu(a)
    p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
    e = Conv <pads = [1,1,1,1], group = 24> (p, d)
    g = Relu(e)
    c = Conv (g, w2)
    s = Add(c, p)
    t = Relu(s)
    u = Conv (t, w3)
    m = GlobalAveragePool(u)
    v = Flatten(m)
    y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (v, f, fb)
}}"""
MLP = f"""mlp (float[5,33] x) => (float[5,7] y) <{weights(w1=(33, 64), b1=(64,), w2=(64, 7))}> {{
    h = MatMul(x, w1)
    i = Add(h, b1)
    j = Relu(i)
    y = MatMul(j, w2)
}}"""
ATTENTION = f"""attention (float[1,12,32] x) => (float[1,12,32] y)
<{weights(q=(32, 32), k=(32, 32), v=(32, 32), o=(32, 32), n=(32,), z=(32,))},
 int64[4] heads = {{1,12,4,8}}, int64[3] all = {{1,12,32}}, float scale = {{0.3535}}> {{
    xq = MatMul(x, q)
    xk = MatMul(x, k)
    xv = MatMul(x, v)
    rq = Reshape(xq, heads)
    rk = Reshape(xk, heads)
    rv = Reshape(xv, heads)
    tq = Transpose <perm = [0,2,1,3]> (rq)
    tk = Transpose <perm = [0,2,3,1]> (rk)
    tv = Transpose <perm = [0,2,1,3]> (rv)
    s = MatMul(tq, tk)
    m = Mul(s, scale)
    p = Softmax <axis = -1> (m)
    c = MatMul(p, tv)
    d = Transpose <perm = [0,2,1,3]> (c)
    e = Reshape(d, all)
    f = MatMul(e, o)
    g = Add(f, x)
    y = LayerNormalization(g, n, z)
}}"""
MIXED = f"""mixed (float[1,8,9,9] x) => (float[1,8,18,18] y, float[1,12,18,18] z)
<{weights(w1=(12, 8, 3, 3), w2=(12, 12, 1, 1), t=(12, 12, 2, 2), w3=(12, 12, 3, 3), w4=(8, 12, 3, 3), g=(1, 12, 1, 1))},
 int64[1] zero = {{0}}, int64[1] twelve = {{12}}, int64[1] one = {{1}}> {{
    a = Conv <pads = [1,1,1,1]> (x, w1)
    b = Sigmoid(a)
    c = Mul(a, b)
    d = ConvTranspose <strides = [2,2]> (c, t)
    e = Relu(d)
    p = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (e)
    q = Conv (p, w2)
    r = Add(q, e)
    i = Concat <axis = 1> (r, e)
    s = Slice(i, zero, twelve, one)
    u = Conv <pads = [1,1,1,1]> (s, w3)
    z = Mul(u, g)
    y = Conv <pads = [1,1,1,1]> (z, w4)
}}"""
MODELS = {"cnn": CNN, "mlp": MLP, "attention": ATTENTION}


@pytest.fixture(params=MODELS)
def graph(request: pytest.FixtureRequest) -> Graph:
    return graph_of(MODELS[request.param])


def feeds_of(graph: Graph) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {name: random.normal(size=graph.tensor(name).dims).astype(np.float32) for name in graph.inputs}


def rounded(graph: Graph) -> Graph:
    return run_pass(BF16, graph, Context())


def error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in expected)


def compiled(graph: Graph, target: Target) -> dict[str, np.ndarray]:
    return run_program(compile_program(graph, target, 1, "bf16"), feeds_of(graph))


def test_onnx_runtime_runs_the_rounded_graph_near_the_float_one(graph: Graph) -> None:
    difference = error(ort.run(rounded(graph), feeds_of(graph)), ort.run(graph, feeds_of(graph)))
    assert 0 < difference < 2e-2


def test_compiled_is_what_onnx_runtime_says(graph: Graph) -> None:
    after = rounded(graph)
    assert error(compiled(after, find_target("host")), ort.run(after, feeds_of(after))) < 1e-2


def without_bfloat16(target: Target) -> Target:
    """The same processor, its bfloat16 instructions forgotten."""
    kernels = {
        dtype: dataclasses.replace(kernel, features=tuple(name for name in kernel.features if name != "avx512bf16"))
        for dtype, kernel in target.microkernels.items()
        if dtype != "bfloat16"
    }
    attributes = [name for name in target.tvm.get("mattr", []) if "bf16" not in name]
    return dataclasses.replace(target, microkernels=kernels, tvm={**target.tvm, "mattr": attributes})


def test_any_target_computes_the_same_in_float32(graph: Graph) -> None:
    after = rounded(graph)
    assert error(compiled(after, without_bfloat16(find_target("host"))), ort.run(after, feeds_of(after))) < 1e-2


def test_every_layer_multiplies_bfloat16_and_stores_it_where_bfloat16_is_read(graph: Graph) -> None:
    after = rounded(graph)
    layers = [region for region in regions(after) if region.anchor.op in ("Conv", "Gemm", "MatMul")]
    assert all(region.bfloat16 for region in layers)
    assert {work.dtype for work in workloads(after) if work.macs and work.kind != "depthwise"} == {"bfloat16"}
    read = {value for region in regions(after) for value in region.inputs}
    stored = {after.tensor(region.output).dtype for region in layers if region.output in read}
    assert "bfloat16" in stored
    assert not any(work.kind == "elementwise" and "widened" in work.name for work in workloads(after))


def test_a_residual_stays_in_bfloat16() -> None:
    after = rounded(graph_of(CNN))
    (region,) = (region for region in regions(after) if [node.op for node in region.epilogue] == ["Add", "Relu", "Cast"])
    assert {after.tensor(value).dtype for value in region.inputs} == {"bfloat16"}


def test_weights_take_half_the_bytes_in_the_file(graph: Graph) -> None:
    after = rounded(graph)
    assert weight_bytes(after) < 0.62 * weight_bytes(graph)
    again = from_model(to_model(after))
    assert again.digest == after.digest


def test_float_int8_and_bfloat16_layers_in_one_graph() -> None:
    graph = graph_of(MIXED)
    context = Context(find_target("host"), random_samples(graph))
    names = [node.name for node in graph.nodes if node.op == "Conv"]
    once = run_pass(Quantize((names[0], names[2]), dtype="bf16"), graph, context)
    both = run_pass(Quantize((names[1],)), once, context)
    assert {work.dtype for work in workloads(both) if work.macs} == {"float32", "bfloat16", "int8"}
    for after in (rounded(graph), both):
        assert error(compiled(after, find_target("host")), ort.run(after, feeds_of(after))) < 1e-2


def test_the_text_form_parses_back() -> None:
    assert str(BF16) == "quantize{dtype=bf16}"
    assert parse(str(BF16), find_passes()) == BF16


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(PassError, match="no dtype"):
        run_pass(Quantize(dtype="bf61"), graph_of(MLP), Context())


def test_a_second_time_changes_nothing(graph: Graph) -> None:
    once = rounded(graph)
    assert run_pass(BF16, once, Context()) is once


def test_layers_one_after_the_other_are_like_all_at_once(graph: Graph) -> None:
    after = graph
    for node in graph.nodes:
        if node.op in ("Conv", "Gemm", "MatMul"):
            after = run_pass(Quantize((node.name,), dtype="bf16"), after, Context())
    assert error(ort.run(after, feeds_of(graph)), ort.run(rounded(graph), feeds_of(graph))) < 1e-2
    assert {work.dtype for work in workloads(after) if work.macs and work.kind != "depthwise"} == {"bfloat16"}


def test_candidates_where_the_target_multiplies_bfloat16() -> None:
    graph, host = graph_of(MLP), find_target("host")
    able = dataclasses.replace(host, microkernels={**host.microkernels, "bfloat16": host.microkernels["float32"]})
    found = [one for one in Quantize.candidates(graph, able) if getattr(one, "dtype", "") == "bf16"]
    assert found == [Quantize((node.name,), dtype="bf16") for node in graph.nodes if node.op == "MatMul"]


def test_refusals_where_it_does_not() -> None:
    graph, host = graph_of(MLP), without_bfloat16(find_target("host"))
    found = list(Quantize.candidates(graph, host))
    assert Refusal("quantize", "mlp", "target has no bfloat16 kernels") in found
    assert not any(getattr(one, "dtype", "") == "bf16" for one in found)


def test_the_dot_product_instruction_is_used(graph: Graph) -> None:
    """Whatever machine this is: only the code is looked at."""
    flags = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}
    target = dataclasses.replace(find_target("host"), microkernels=_isa_x86.microkernels(flags), tvm=_isa_x86.llvm(flags))
    _, functions = named(reading(rounded(graph), target), "bf16")
    module = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    assembly = tvm.tirx.build(module, target=tvm.target.Target(dict(target.tvm))).inspect_source("asm")
    assert "vdpbf16ps" in assembly
    assert "vcvtneps2bf16" in assembly


def test_arm_multiplies_pairs_too() -> None:
    spec = MatmulSpec(1, 9, 40, 65, data_dtype="bfloat16", weight_dtype="bfloat16", out_dtype="bfloat16")
    flags = {"asimd", "asimddp", "bf16"}
    micro = _isa_arm.microkernels(flags)["bfloat16"]
    function = kernels.build(spec, kernels.default_schedule(spec, micro), micro, "product")
    module = tvm.tirx.build(tvm.IRModule({"product": function}), target=tvm.target.Target(_isa_arm.llvm(flags)))
    assert "\tbfdot\t" in module.inspect_source("asm")


def test_the_planner_sees_three_precisions() -> None:
    """Per layer, each with its own price: bfloat16 between float32 and int8."""
    graph = graph_of(MLP)
    target = find_target("host")
    able = dataclasses.replace(target, microkernels={**target.microkernels, "bfloat16": _isa_x86.AVX512_BF16})
    roofline = getattr(able.cost, "analytical", able.cost)  # behind a learned table, where this processor has one
    peak = roofline.peak["float32"]
    cost = dataclasses.replace(roofline, peak={"float32": peak, "bfloat16": 2 * peak, "int8": 4 * peak})
    context = Context(able, random_samples(graph))
    found = {"float32": graph} | {
        one.dtype: run_pass(one, graph, context)
        for one in Quantize.candidates(graph, able)
        if isinstance(one, Quantize) and one.site == ("MatMul_0",)
    }
    assert set(found) == {"float32", "bf16", "int8"}
    dtypes = {name: next(work for work in workloads(one) if work.macs).dtype for name, one in found.items()}
    assert dtypes == {"float32": "float32", "bf16": "bfloat16", "int8": "int8"}
    wide = {name: next(dataclasses.replace(work, m=4096, n=4096, k=4096) for work in workloads(one) if work.macs)
            for name, one in found.items()}  # fmt: skip
    seconds = {name: cost.estimate(work, 1).seconds for name, work in wide.items()}
    assert seconds["int8"] < seconds["bf16"] < seconds["float32"]


def test_tuning_makes_and_compares_bfloat16_data() -> None:
    bits = child.random_array(np.random.default_rng(0), "bfloat16", 1000, -1.0, 1.0)
    values = bits.view(BFLOAT16).astype(np.float32)
    assert -1.0 <= values.min() < -0.9
    assert 0.9 < values.max() <= 1.0
    batch = object.__new__(child.Batch)
    batch.command = {"signature": [["out", "bfloat16", 1000, 0.0, 0.0]]}
    assert batch._same(bits + 1, bits)  # the neighbours
    assert not batch._same(bits, np.roll(bits, 1))


NUMBERS = [1.0, 1.00390625, 1.01171875, -1.01171875, 3.4e38, np.inf, -np.inf, np.nan, -0.0, 1e-39, 65504.0]


def test_rounding_is_to_nearest_even_and_keeps_nan() -> None:
    graph = graph_of("round (float[11] x) => (float[11] y) { b = Cast <to = 16> (x) y = Cast <to = 1> (b) }")
    x = np.array(NUMBERS, np.float32)
    expected = x.astype(BFLOAT16).astype(np.float32)
    np.testing.assert_array_equal(ort.run(graph, {"x": x})["y"], expected)
    found = run_program(compile_program(graph, find_target("host"), 1, "bf16"), {"x": x})["y"]
    np.testing.assert_array_equal(found, expected)


POOL = """pool (float[2,40,13,11] x) => (float[2,40,7,6] y) {
    b = Cast <to = 16> (x)
    c = Cast <to = 1> (b)
    p = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (c)
    d = Cast <to = 16> (p)
    y = Cast <to = 1> (d)
}"""


def test_a_pool_reads_and_writes_bfloat16() -> None:
    graph = graph_of(POOL)
    x = feeds_of(graph)["x"] - 2
    x[0, 0, :3, :3] = -np.inf
    program = compile_program(graph, find_target("host"), 1, "bf16")
    np.testing.assert_array_equal(run_program(program, {"x": x})["y"], ort.run(graph, {"x": x})["y"])
    (pool,) = (call for call in program.calls if "Pool" in call.label)
    assert [program.buffers[name].dtype for name in pool.args] == ["bfloat16", "bfloat16"]


def test_joined_channels_that_are_no_whole_vectors_are_widened() -> None:
    """Squeeze-and-expand: a vector of the mean over the joined channels reads from both halves."""
    graph = graph_of(f"""fire (float[1,16,6,6] x) => (float[1,8] y)
      <{weights(a=(56, 16, 1, 1), b=(56, 16, 3, 3), w=(8, 112))}> {{
        c = Conv (x, a)
        d = Conv <pads = [1,1,1,1]> (x, b)
        e = Relu (c)
        f = Relu (d)
        g = Concat <axis = 1> (e, f)
        p = GlobalAveragePool (g)
        q = Flatten (p)
        y = Gemm <transB = 1> (q, w)
      }}""")
    changed = run_pass(BF16, graph, Context())
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 16, 6, 6)).astype(np.float32)}
    wanted = ort.run(changed, feeds)["y"]
    found = run_program(compile_program(changed, find_target("host"), 1), feeds)["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3 * float(np.abs(wanted).max()))


def test_softmax_and_layer_norm_store_bfloat16() -> None:
    heading = f"rows (float[3,12,32] x) => (float[3,12,7] y) <{weights(n=(32,), z=(32,), w=(32, 32), v=(32, 7))}>"
    body = "{ a = LayerNormalization(x, n, z) b = MatMul(a, w) c = Add(b, a) d = Softmax <axis = -1> (c) y = MatMul(d, v) }"
    after = rounded(graph_of(heading + body))
    stored = {region.name: after.tensor(region.output).dtype for region in regions(after) if region.kind != "matmul"}
    assert set(stored.values()) == {"bfloat16"}
    assert error(compiled(after, find_target("host")), ort.run(after, feeds_of(after))) < 1e-2


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="runs x86 code")
def test_processors_without_fused_multiply_add_compute_attention_too() -> None:
    """There the compiler must not take a rounding sum apart: exp would be wrong by a tenth."""
    for graph in (graph_of(ATTENTION), rounded(graph_of(ATTENTION))):
        assert error(compiled(graph, find_target("x86-64-v2")), ort.run(graph, feeds_of(graph))) < 1e-2


def test_padding_and_odd_depths_do_not_read_what_is_no_number() -> None:
    """The last pair of a run of odd length reads one element: its neighbour may be NaN."""
    heading = f"odd (float[1,3,5,5] x) => (float[1,8,5,5] y) <{weights(w=(8, 3, 3, 3))}>"
    graph = graph_of(heading + "{ y = Conv <pads = [1,1,1,1]> (x, w) }")
    after, x = rounded(graph), np.ones((1, 3, 5, 5), np.float32)
    x[0, 0, 0, 4] = np.nan
    expected = ort.run(after, {"x": x})["y"]
    found = run_program(compile_program(after, find_target("host"), 1, "bf16"), {"x": x})["y"]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
