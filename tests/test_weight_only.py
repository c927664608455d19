"""Weights as codes: every width and form against numpy and ONNX Runtime, on every instruction set that this machine executes."""

from __future__ import annotations

from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

import hwopt
from hwopt.analysis.compressed import compressed
from hwopt.analysis.regions import regions
from hwopt.analysis.workload import workloads
from hwopt.backends.ort import run
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.coded import expanded_because
from hwopt.backends.tvm.kernels import packed
from hwopt.backends.tvm.kernels.decode import Coding
from hwopt.backends.tvm.kernels.packed import Codes, PackedSpec
from hwopt.backends.tvm.run import run_program
from hwopt.build import build
from hwopt.compiler import plan_model
from hwopt.errors import PassError
from hwopt.io.proto import to_model
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.job import read_plan
from hwopt.pipeline import Context, parse
from hwopt.plan.explain import explain
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from targets import _isa_x86
from tests._machines import execute
from tests.test_cross import BOARDS
from tests.test_kernels import FLAGS, machine, machine_flags

HOST = find_target("host")


def kernel_error(spec: PackedSpec, level: str, seed: int = 0, cores: int = 1) -> float:
    """The largest error of a kernel against numpy, relative to the largest result."""
    generator = np.random.default_rng(seed)
    flags = FLAGS[level]
    first = _isa_x86.microkernels(flags)["float32" if spec.data_dtype == "float32" else "int8"]
    micro = next((one for one in (first, *first.others) if not packed.supports(spec, one)), first)
    reason = packed.supports(spec, micro)
    if reason:
        pytest.skip(reason)
    weights, dense = random_codes(spec, generator)
    if spec.data_dtype == "float32":
        data = generator.standard_normal((spec.m, spec.k), np.float32)
    else:
        data = generator.integers(0, 256, (spec.m, spec.k)).astype(np.uint8)
    function = packed.build(spec, packed.schedule_of(spec, micro, cores), micro, "kernel")
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        library = tvm.tirx.build(tvm.IRModule({"kernel": function}), tvm.target.Target(_isa_x86.llvm(flags)))
    out = tvm.runtime.tensor(np.zeros(spec.m * spec.n, spec.out_dtype))
    library["kernel"](*map(tvm.runtime.tensor, (data.reshape(-1), *packed.pack(spec, weights, micro))), out)
    want = (data.astype(np.float64) @ dense.T).reshape(-1)
    return float(np.abs(out.numpy() - want).max() / np.abs(want).max())


def random_codes(spec: PackedSpec, generator: np.random.Generator) -> tuple[Codes, np.ndarray]:
    """Weights for a kernel, and the same decoded, [n, k] float64."""
    coding = spec.coding
    codes = generator.integers(0, 2**coding.bits, (spec.n, spec.k)).astype(np.uint8)
    if coding.books:
        books = generator.integers(-128, 128, (coding.books, 2**coding.bits)).astype(np.float32)
        dense = np.repeat(books, spec.n // coding.books, 0)[np.arange(spec.n)[:, None], codes].astype(np.float64)
    else:
        half = 2 ** (coding.bits - 1)
        books, dense = None, ((codes.astype(np.int64) + half) % (2 * half) - half).astype(np.float64)
    if not spec.block:
        return Codes(codes, books), dense
    scales = generator.uniform(0.5, 2, (spec.n, spec.blocks)).astype(np.float32)
    zeros = generator.integers(-3, 4, scales.shape).astype(np.float32) if spec.zeros else None
    along = [np.repeat(one, spec.block, 1)[:, : spec.k] for one in (scales, np.zeros_like(scales) if zeros is None else zeros)]
    return Codes(codes, books, scales, zeros), (dense - along[1]) * along[0]


def level_or_skip(level: str) -> str:
    if not FLAGS[level] <= machine_flags():
        pytest.skip(f"this machine lacks {level}")
    return level


CODINGS = [Coding(bits, books) for bits in range(1, 9) for books in (0, 1) if books or bits in (2, 4, 8)] + [Coding(4, 3)]


@pytest.mark.parametrize("level", ["sse", "avx2", "avx512"])
@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_codes_of_every_width_are_decoded_on_every_level(coding: Coding, level: str) -> None:
    assert kernel_error(PackedSpec(3, 96, 77, coding), level_or_skip(level)) < 3e-5


@pytest.mark.parametrize("level", ["sse", "avx2", "avx-vnni", "avx512", "avx512-vnni"])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_integer_kernels_look_bytes_up_exactly(bits: int, level: str) -> None:
    micro = _isa_x86.microkernels(FLAGS[level_or_skip(level)])["int8"]
    spec = PackedSpec(2, 64, 45, Coding(bits, 1), data_dtype=micro.activation, out_dtype="int32")
    assert kernel_error(spec, level) == 0


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 20), st.integers(1, 70), st.integers(1, 150), st.sampled_from(CODINGS[:-1]), st.sampled_from([0, 32, 64]),
    st.booleans(), st.sampled_from([1, 3]),
)  # fmt: skip
def test_any_shape_with_any_blocks(m: int, n: int, k: int, coding: Coding, block: int, zeros: bool, cores: int) -> None:
    level = next(name for name, flags in reversed(FLAGS.items()) if flags == machine())
    spec = PackedSpec(m, n, k, coding, block, zeros and block > 0)
    assert kernel_error(spec, level, cores=cores) < 3e-5


def layer(op: str, m: int, k: int, n: int, tail: str = "") -> Graph:
    """x -> MatMul, Gemm (weights [n, k]) or 1 x 1 Conv over 1 x m images, with a bias and a ReLU."""
    generator = np.random.default_rng(5)
    weight = (generator.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
    bias = generator.standard_normal(n).astype(np.float32)
    if op == "MatMul":
        weight, shape = weight.T, (m, k)
        nodes = [Node(op, ("x", "w"), ("h",), "fc"), Node("Add", ("h", "b"), ("a",), "add")]
    elif op == "Gemm":
        shape = (m, k)
        nodes = [Node(op, ("x", "w", "b"), ("a",), "fc", MappingProxyType({"transB": 1}))]
    else:
        weight, shape = weight.reshape(n, k, 1, 1), (1, k, 1, m)
        nodes = [Node(op, ("x", "w", "b"), ("a",), "fc")]
    nodes.append(Node(tail or "Relu", ("a",), ("y",), "last"))
    params = {"w": frozen(np.ascontiguousarray(weight)), "b": frozen(bias)}
    types = MappingProxyType({"x": TensorType("float32", shape)})
    return infer_types(Graph("layer", ("x",), ("y",), tuple(nodes), types, MappingProxyType(params), {"": 21}))


def feeds(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(graph.tensor(name).dims, np.float32) for name in graph.inputs}


def applied(text: str, graph: Graph, **context: object) -> Graph:
    return parse(text, find_passes()).run(graph, Context(target=HOST, **context))  # type: ignore[arg-type]


def constant_bytes(program) -> int:  # type: ignore[no-untyped-def]
    return sum(one.data.nbytes for one in program.buffers.values() if one.kind == "constant" and one.data is not None)


def check(graph: Graph, compact: bool = True) -> int:
    """Compiled, it computes what ONNX Runtime does; returns the bytes of its constants."""
    program = compile_program(graph, HOST, compact=compact)
    want = run(graph, feeds(graph))["y"]
    np.testing.assert_allclose(run_program(program, feeds(graph))["y"], want, atol=2e-5 * np.abs(want).max())
    return constant_bytes(program)


FORMS = {
    "quantize-weights": 8.5,
    "quantize-weights{bits=4}": 4.5,
    "quantize-weights{bits=4,group=32}": 5.5,
    "quantize-weights{group=64}": 9,
    "share-weights{bits=2}": 2.5,
    "share-weights{bits=4}": 4.5,
    "share-weights{bits=6}": 6.5,
    "share-weights{bits=3,axis=channel-group,group=32}": 3.5,
}


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [1, 17])
def test_layers_compute_what_onnx_runtime_does_and_stay_small(form: str, op: str, m: int) -> None:
    graph = applied(form, layer(op, m, 128, 192))
    assert check(graph) < 128 * 192 * FORMS[form] / 8 + 2048


def test_few_rows_stay_codes_and_many_are_decoded_when_packed_unless_size_matters() -> None:
    sizes = {}
    for m, compact in ((1, False), (256, False), (256, True)):
        graph = applied("quantize-weights{bits=4,group=32}", layer("Gemm", m, 1024, 2048))
        sizes[m, compact] = check(graph, compact)
    full = 1024 * 2048 * 4
    assert sizes[1, False] < full / 6
    assert sizes[256, False] > full
    assert sizes[256, True] < full / 6


def test_the_reason_why_weights_are_expanded_is_stated() -> None:
    many, few = (applied("quantize-weights", layer("Gemm", m, 1024, 2048)) for m in (256, 1))
    plain = layer("Gemm", 1, 64, 64)
    reasons = [expanded_because(graph, regions(graph)[0], HOST, 1) for graph in (many, few, plain)]
    assert reasons == [
        "decoding in the kernel is not faster for 256 rows of 1024 x 2048 weights",
        "",
        "its weights are not coded",
    ]


def blocked(kind: type, block: int, axis: int, zero: bool) -> Graph:
    """x @ DequantizeLinear(q) as exporters write it: any of ONNX's small integers, along either axis."""
    generator = np.random.default_rng(7)
    info = ml_dtypes.iinfo(kind)
    k, n = 96, 80
    q = generator.integers(info.min, info.max + 1, (k, n)).astype(kind)
    shape = tuple(dim // block if i == axis and block else dim for i, dim in enumerate((k, n))) if block else (n,)
    scale = generator.uniform(0.01, 0.02, shape).astype(np.float32)
    params = {"q": frozen(q), "s": frozen(scale)}
    if zero:
        params["z"] = frozen(generator.integers(info.min, info.max + 1, shape).astype(kind))
    attrs = {"axis": axis, "block_size": block} if block else {"axis": 1}
    nodes = (
        Node("DequantizeLinear", ("q", "s", "z") if zero else ("q", "s"), ("w",), "dq", MappingProxyType(attrs)),
        Node("MatMul", ("x", "w"), ("y",), "fc"),
    )
    types = MappingProxyType({"x": TensorType("float32", (2, k))})
    return infer_types(Graph("blocked", ("x",), ("y",), nodes, types, MappingProxyType(params), {"": 21}))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("block", "axis"), [(0, 1), (32, 0), (48, 0), (16, 1)])
@pytest.mark.parametrize("kind", [ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8])
def test_dequantize_linear_of_any_integers(kind: type, block: int, axis: int, zero: bool) -> None:
    graph = blocked(kind, block, axis, zero)
    found = compressed(graph, graph.node["fc"])
    assert isinstance(found, str) == (axis == 1 and block > 0)
    check(graph)


def test_a_transposition_behind_the_dequantization_is_seen_through() -> None:
    graph = blocked(ml_dtypes.int4, 32, 0, False)
    edit = graph.edit()
    turned = edit.param("turned", np.ascontiguousarray(graph.params["q"].T))
    scale = edit.param("turned_scale", np.ascontiguousarray(graph.params["s"].T))
    value = edit.emit("DequantizeLinear", [turned, scale], attrs={"axis": 1, "block_size": 32})
    edit.forward("w", edit.emit("Transpose", [value], attrs={"perm": (1, 0)}))
    after = edit.finish("test")
    assert not isinstance(compressed(after, after.node["fc"]), str)
    np.testing.assert_allclose(run(after, feeds(after))["y"], run(graph, feeds(graph))["y"], atol=1e-4)
    assert check(after) < 96 * 80


def test_a_palette_of_bytes_multiplies_with_integers() -> None:
    graph = layer("Gemm", 1, 256, 256)
    data = Samples({"x": np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)})
    shared = applied("share-weights{bits=4}", graph)
    after = applied("quantize", shared, calibration=data)
    program = compile_program(after, HOST, compact=True)
    want, step = run(after, feeds(after))["y"], 0.05
    assert np.abs(run_program(program, feeds(after))["y"] - want).max() <= step
    assert constant_bytes(program) < 256 * 256 / 2 + 4096
    assert constant_bytes(compile_program(after, HOST)) >= 256 * 256  # too small to wait for its weights


@pytest.mark.parametrize("op", ["Gemm", "MatMul", "Conv"])
def test_integer_kernels_read_weights_of_4_bits(op: str) -> None:
    graph = layer(op, 1, 256, 256)
    data = Samples({"x": np.random.default_rng(1).standard_normal((64, *graph.tensor("x").dims[1:])).astype(np.float32)})
    after = applied("quantize{weights=int4}", graph, calibration=data)
    assert [region.integer for region in regions(after)][-1]
    program = compile_program(after, HOST, compact=True)
    np.testing.assert_allclose(run_program(program, feeds(after))["y"], run(after, feeds(after))["y"], atol=0.05)
    assert constant_bytes(program) < 256 * 256 / 2 + 4096


def test_error_grows_with_fewer_bits_and_groups_make_up_for_it() -> None:
    graph = layer("MatMul", 4, 256, 128)
    want = run(graph, feeds(graph))["y"]

    def error(options: str) -> float:
        after = applied(f"quantize-weights{{{options}}}", graph)
        return float(np.square(run(after, feeds(after))["y"] - want).mean() / np.square(want).mean())

    assert error("bits=8") < 1e-4 < error("bits=4,group=32") < error("bits=4") < 0.02


def test_calibration_data_make_strong_inputs_count() -> None:
    graph = layer("Gemm", 8, 64, 64)
    strength = np.where(np.arange(64) % 8 == 0, 30.0, 0.1).astype(np.float32)
    data = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32) * strength
    want = run(graph, {"x": data[:8]})["y"]
    errors = [
        np.square(run(applied("quantize-weights{bits=4}", graph, **context), {"x": data[:8]})["y"] - want).mean()
        for context in ({}, {"calibration": Samples({"x": data})})
    ]
    assert errors[1] < 0.9 * errors[0]


def test_what_cannot_be_grouped_or_is_shared_is_refused() -> None:
    graph = layer("Gemm", 1, 100, 64)
    ctx = Context()
    assert parse("quantize-weights{bits=4,group=32}", find_passes()).run(graph, ctx) is graph
    assert [one.reason for one in ctx.refused] == ["group 32 does not divide 100 inputs"]
    with pytest.raises(PassError, match="bits is 3, 4 or 8"):
        applied("quantize-weights{bits=5}", graph)


def test_the_library_that_ships_is_small(tmp_path) -> None:  # type: ignore[no-untyped-def]
    graph = layer("Gemm", 1, 1024, 1024)
    sizes = [
        build(one, HOST, 1, tmp_path / str(index)).library.weight_bytes
        for index, one in enumerate((graph, applied("quantize-weights{bits=4,group=32}", graph)))
    ]
    assert sizes[1] < sizes[0] / 6


def test_the_planner_gains_time_by_small_weights_where_rows_are_few() -> None:
    few, many = layer("Gemm", 1, 2048, 2048), layer("Gemm", 512, 512, 512)
    seconds = [
        sum(HOST.cost.estimate(work, 1).seconds for work in workloads(one))
        for graph in (few, many)
        for one in (graph, applied("quantize-weights{bits=4,group=32}", graph))
    ]
    assert seconds[1] < seconds[0] / 1.3
    assert seconds[3] == pytest.approx(seconds[2], rel=0.05)


def test_the_artifact_says_which_layers_the_library_holds_decoded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    graph = layer("Gemm", 64, 256, 256)
    options = {"calibrate": {"x": np.random.default_rng(3).standard_normal((256, 256)).astype(np.float32)}}
    artifact = hwopt.compile(to_model(graph), out=tmp_path / "a", passes="quantize-weights{bits=8}", **options)
    assert any("holds the weights of 1 layers decoded" in note for note in artifact.report["notes"])
    told = explain(read_plan(tmp_path / "a" / "plan.json"))
    assert "decode-in-kernel at fc: decoding in the kernel is not faster for 64 rows" in told
    assert artifact.report["result"]["library_weight_bytes"] > 3 * artifact.report["result"]["weight_bytes"]


def test_models_with_a_batch_are_planned_for_size() -> None:
    data = {"x": np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)}
    found = plan_model(to_model(layer("Gemm", 8, 256, 256)), calibrate=data, budget=hwopt.Budget(1.0, weight_bytes=100_000))
    assert [one.by[0].partition("{")[0] for one in found.plan.decisions]


PALETTES = [f"share-weights{{bits={bits}}}" for bits in (2, 3, 4, 6)]


@pytest.mark.parametrize("name", BOARDS)
@pytest.mark.parametrize("form", ["quantize-weights", "quantize-weights{bits=4,group=32}", *PALETTES])
def test_boards_decode_as_this_machine_does(tmp_path, form: str, name: str) -> None:  # type: ignore[no-untyped-def]
    target, board = BOARDS[name]
    if reason := board.missing():
        pytest.skip(reason)
    graph = applied(form, layer("Gemm", 1, 128, 64))
    library = build(graph, target, 1, tmp_path, compact=True).library
    assert library.weight_bytes < 128 * 64 * FORMS.get(form, 8) / 8 + 2048
    want = run(graph, feeds(graph))["y"]
    np.testing.assert_allclose(execute(library, board, feeds(graph))["y"], want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["neon", "dotprod", "i8mm"])
def test_boards_look_bytes_up_for_integers(tmp_path, name: str) -> None:  # type: ignore[no-untyped-def]
    target, board = BOARDS[name]
    if reason := board.missing():
        pytest.skip(reason)
    shared = applied("share-weights{bits=4}", layer("Gemm", 1, 128, 64))
    data = Samples({"x": np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32)})
    graph = parse("quantize", find_passes()).run(shared, Context(target=target, calibration=data))
    library = build(graph, target, 1, tmp_path, compact=True).library
    assert library.weight_bytes < 128 * 64 / 2 + 2048
    want, step = run(graph, feeds(graph))["y"], 0.05
    assert np.abs(execute(library, board, feeds(graph))["y"] - want).max() <= step
