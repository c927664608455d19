"""The torch backend: ONNX Runtime's values, the right gradients, and trained parameters back in the graph."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import onnx
import pytest

from hwopt.backends.ort import run
from hwopt.demo import MODEL, SHAPES, demo_data
from hwopt.errors import DataError, HwoptError, PassError, UnsupportedError
from hwopt.io.onnx import load
from hwopt.ir import Graph, Node, infer_types, onnx_dtype
from hwopt.pipeline import Context, run_pass
from hwopt.samples import Samples
from passes.quantize import Quantize
from passes.share_weights import ShareWeights
from tests._torch_cases import CASES, Case
from tests.random_graphs import Builder, conv, linear, random_feeds, random_graph
from tests.test_io_nodes import ILLEGAL, RANDOM, known

torch = pytest.importorskip("torch")
backend = pytest.importorskip("hwopt.backends.torch")
call_of = pytest.importorskip("hwopt.backends._torch_call")


def demo() -> Graph:
    return load(MODEL, shapes=SHAPES)


def image(count: int = 1) -> dict[str, np.ndarray]:
    return {"image": demo_data()[0]["image"][:count]}


def assert_like_ort(graph: Graph, feeds: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    wanted = run(graph, feeds)
    with torch.no_grad():
        found = backend.Module(graph)(feeds)
    for name, array in wanted.items():
        got = backend.to_array(found[name])
        assert got.dtype == array.dtype and got.shape == array.shape, name
        scale = max(1e-3, float(np.abs(array.astype(np.float64)).max(initial=0)))
        assert np.abs(got.astype(np.float64) - array).max(initial=0) <= tolerance * scale, name


# Values


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_ratios_that_are_whole_in_float32_only_resize_as_in_onnx_runtime(mode: str) -> None:
    attrs = f'mode = "{mode}", nearest_mode = "ceil", coordinate_transformation_mode = "asymmetric"'
    text = f"(float[1,1,10,20] x) => (float[1,1,n,m] y) <float[4] s = {{1,1,1.3,0.7}}> {{ y = Resize <{attrs}> (x, , s) }}"
    graph = load(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> agraph {text}'))
    assert_like_ort(graph, {"x": np.arange(200, dtype=np.float32).reshape(1, 1, 10, 20)})


PACKED = ("INT4", "INT2")  # the harness feeds and fetches these as packed bytes


def test_node_tests_of_supported_operators_give_onnx_runtimes_values() -> None:
    checked, wrong, ops = 0, [], set()
    for case, values, expected in known():
        arrays = all(isinstance(value, np.ndarray) for value in values)
        if case.name in RANDOM | ILLEGAL or not arrays or any(part in case.name for part in PACKED):
            continue
        names = [value.name for value in case.model.graph.input]
        try:
            graph = load(case.model, shapes={n: v.shape for n, v in zip(names, values, strict=False)}, allow_nan=True)
        except HwoptError:
            continue
        if backend.unsupported(graph):
            continue
        checked += 1
        ops.update(node.op for node in graph.nodes)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = backend.Module(graph)(dict(zip(names, values, strict=False)))
        got = [backend.to_array(found[name]) for name in graph.outputs]
        wrong += [case.name for one, other in zip(got, expected, strict=True) if not _same(one, np.asarray(other))]
    assert wrong == []
    assert checked >= 950
    assert len(ops) >= 120


def _same(found: np.ndarray, wanted: np.ndarray) -> bool:
    if found.shape != wanted.shape or (found.dtype != wanted.dtype and wanted.dtype != np.uint16):
        return False
    room = 2e-3 if wanted.dtype.itemsize < 4 and wanted.dtype.kind not in "iub" else 1e-4
    return np.allclose(found.astype(np.float64), wanted.astype(np.float64), rtol=room, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_give_onnx_runtimes_values(seed: int) -> None:
    graph = random_graph(seed)
    assert_like_ort(graph, random_feeds(graph), 1e-4)


def test_the_demo_model_gives_onnx_runtimes_values() -> None:
    assert_like_ort(demo(), image())


def test_quantized_and_shared_demo_gives_onnx_runtimes_values() -> None:
    graph, ctx = demo(), Context(calibration=Samples(image(16)))
    for one in (ShareWeights(bits=6), Quantize()):
        graph = run_pass(one, graph, ctx)
    assert {"QuantizeLinear", "Gather", "BitwiseAnd"} <= {node.op for node in graph.nodes}
    found = backend.Module(graph)(image())
    (wanted,) = run(graph, image()).values()
    step = np.abs(np.diff(np.unique(wanted))).min()  # one step of the last grid: rounding may fall to the other side
    assert np.abs(backend.to_array(found["logits"]) - wanted).max() <= 1.01 * step


def test_observed_values_come_with_the_outputs() -> None:
    graph = demo()
    inner = graph.nodes[3].output
    module = backend.Module(graph)
    found = module(image(), observe=[inner])
    assert set(found) == {"logits", inner} == set(module.values)
    with pytest.raises(PassError, match="no value 'nothing'"):
        module(image(), observe=["nothing"])


def test_a_missing_input_is_named() -> None:
    with pytest.raises(DataError, match="lacks input 'image'"):
        backend.Module(demo())({})


def test_all_operators_without_a_rule_are_in_one_error() -> None:
    b = Builder()
    b.outputs.append(b.op("Det", [b.op("NonZero", [b.input((2, 3))], (2, 6))], ()))
    graph = b.graph()
    with pytest.raises(UnsupportedError, match=r"NonZero: .*Det: "):
        backend.Module(graph)


# Gradients


def graph_of(case: Case) -> Graph:
    """One node; floats are inputs, the rest parameters."""
    names = tuple("" if array is None else f"i{index}" for index, array in enumerate(case.inputs))
    outputs = tuple(f"o{index}" for index in range(len(case.writes)))
    info = onnx.helper.make_tensor_value_info
    held = {name: array for name, array in zip(names, case.inputs, strict=True) if name}
    floats = [name for name, array in held.items() if array.dtype == np.float64]
    node = Node(case.op, names, outputs, "n", case.attrs)
    types = [info(name, 11, held[name].shape) for name in floats]
    body = onnx.helper.make_graph([node.proto], "g", types, [info(n, onnx_dtype(k), None) for n, k in zip(outputs, case.writes)])  # noqa: B905
    body.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in held.items() if n not in floats)
    from hwopt.io.proto import stated_graph

    return stated_graph(onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 24)]))


@pytest.mark.parametrize("op", sorted(backend.RULES))
def test_every_rule_passes_gradcheck(op: str) -> None:
    """A rule without a case fails. Where no output is a float there must be no gradient."""
    mine = [case for case in CASES if case.op == op]
    assert mine, f"{op} has no case in tests/_torch_cases.py"
    for case in mine:
        _check_gradients(case)


def _check_gradients(case: Case) -> None:
    reads = tuple("" if one is None else _kind(one, case) for one in case.inputs)
    call = call_of.Call(Node(case.op, (), (), "n", case.attrs), reads, case.writes, True, call_of.unrounded)
    tensors = [None if one is None else torch.tensor(one) for one in case.inputs]
    wanted = [i for i, one in enumerate(tensors) if one is not None and one.is_floating_point() and not _setting(case, i)]
    for index in wanted:
        tensors[index].requires_grad_()

    def floats(*changed: Any) -> tuple[Any, ...]:
        inputs = list(tensors)
        for index, one in zip(wanted, changed, strict=True):
            inputs[index] = one
        found = backend.RULES[case.op](call, *inputs)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(one for one in found if one.is_floating_point())

    outputs = floats(*(tensors[index] for index in wanted))
    if not any(one.requires_grad for one in outputs):
        moved = floats(*(tensors[index].detach() + 1e-6 for index in wanted))
        assert all(torch.equal(one, other) for one, other in zip(outputs, moved, strict=True))
        return
    keep = [i for i, one in enumerate(outputs) if one.requires_grad]
    values = tuple(tensors[index] for index in wanted)
    assert torch.autograd.gradcheck(lambda *changed: tuple(floats(*changed)[i] for i in keep), values, eps=1e-6, atol=1e-6)


def _kind(array: np.ndarray, case: Case) -> str:
    if array.dtype == np.float64 and case.op in ("DequantizeLinear", "MatMulInteger", "ConvInteger") and array.ndim > 0:
        return "float64"
    return str(array.dtype)


def _setting(case: Case, index: int) -> bool:
    """Bounds and the like: numbers that are read, not computed with."""
    return index in backend.SETTINGS.get(case.op, ()) or (case.op == "Range") or (case.op == "CastLike" and index == 1)


def fake_quantized(scale: float = 0.5, bits: str = "int8") -> Graph:
    """x -> Q -> Reshape -> DQ -> y: three values."""
    b = Builder()
    x = b.input((3,))
    scale_name, zero = b.param(np.array(scale, np.float32)), b.param(np.array(0, np.int8))
    moved = b.op("Reshape", [b.op("QuantizeLinear", [x, scale_name, zero], (3,)), b.ints(3, 1)], (3, 1))
    b.outputs.append(b.op("DequantizeLinear", [moved, scale_name, zero], (3, 1)))
    return b.graph()


def test_quantization_rounds_forward_and_passes_gradients_within_its_range() -> None:
    graph = fake_quantized()
    module = backend.Module(graph)
    x = torch.tensor([0.6, -1.4, 100.0], requires_grad=True)
    (y,) = module({graph.inputs[0]: x}).values()
    assert y.flatten().tolist() == [0.5, -1.5, 63.5]
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 0]


def test_learned_scales_have_the_gradient_of_lsq() -> None:
    graph = fake_quantized()
    module = backend.Module(graph, scales=True)
    (scale,) = module.parameters()
    x = torch.tensor([0.6, -1.4, 100.0, 63.7], requires_grad=True)  # the last one is rounded to the border, and is beyond it
    (y,) = module({graph.inputs[0]: x}).values()
    y.sum().backward()
    assert scale.grad.item() == pytest.approx((1 - 1.2) + (-3 + 2.8) + 127 + 127, abs=1e-4)
    assert x.grad.tolist() == [1, 1, 0, 0]
    assert list(backend.Module(graph).parameters()) == []


@pytest.mark.parametrize("channels", [False, True])
def test_a_quantizer_with_its_dequantizer_in_one_step_has_the_gradients_of_both(channels: bool) -> None:
    b, random = Builder(np.random.default_rng(0)), np.random.default_rng(1)
    scale, zero = (
        (np.array([0.4, 0.1, 0.2], np.float32), np.array([3, 0, 9], np.uint8)) if channels else (np.float32(0.3), np.uint8(5))
    )
    operands = [b.input((2, 3, 4)), b.param(np.asarray(scale)), b.param(np.asarray(zero))]
    steps = b.op("QuantizeLinear", operands, (2, 3, 4), dtype="uint8", axis=1)
    b.outputs.append(b.op("DequantizeLinear", [steps, *operands[1:]], (2, 3, 4), axis=1))
    graph, found = b.graph(), []
    x, weights = (torch.from_numpy((20 * random.standard_normal((2, 3, 4))).astype(np.float32)) for _ in range(2))
    for observed in ([], [steps]):  # whoever is asked for the integers computes them in a step of their own
        module, fed = backend.Module(graph, scales=True), x.clone().requires_grad_()
        result = module({graph.inputs[0]: fed}, observe=observed)[graph.outputs[0]]
        (result * weights).sum().backward()
        found.append((result.detach(), fed.grad, *(one.grad for one in module.parameters())))
    assert len(found[0]) == 3
    torch.testing.assert_close(found[0], found[1])


def test_rounding_through_bfloat16_is_exact_forward_and_straight_backward() -> None:
    b = Builder()
    x = b.input((3,))
    b.outputs.append(
        b.op(
            "Cast",
            [
                b.op("Cast", [x], (3,), to=16),
            ],
            (3,),
            to=1,
        )
    )
    graph = b.graph()
    value = torch.tensor([1.001, -2.003, 3.3], requires_grad=True)
    (y,) = backend.Module(graph)({graph.inputs[0]: value}).values()
    assert y.tolist() == run(graph, {graph.inputs[0]: value.detach().numpy()})[graph.outputs[0]].tolist()
    assert y[0] != value[0]
    weight = torch.tensor([1.0001, 1.0, 3.0])  # would lose digits if rounded to bfloat16 on its way back
    (y * weight).sum().backward()
    assert value.grad.tolist() == weight.tolist()


def test_gates_have_the_gradient_of_one_edge() -> None:
    b = Builder()
    x = b.input((1, 2))
    b.outputs.append(b.op("Add", [b.op("Mul", [x, x], (1, 2)), x], (1, 2)))
    graph = b.graph()
    gate = torch.ones((1, 2), requires_grad=True)
    module = backend.Module(graph)
    (y,) = module({graph.inputs[0]: np.array([[2.0, 3.0]], np.float32)}, gates={(graph.nodes[0].name, 1): gate}).values()
    y.sum().backward()
    assert gate.grad.tolist() == [[4, 9]]


def test_samples_stack_where_they_do_not_look_at_each_other() -> None:
    assert backend.Module(demo()).stacks(image(3))
    b = Builder()
    parts = b.op("Reshape", [b.input((1, 4, 6)), b.ints(4, 6)], (4, 6))  # the batch merges with rows, and comes back
    b.outputs.append(b.op("Reshape", [b.same("Relu", parts), b.ints(1, 2, 12)], (1, 2, 12)))
    assert backend.Module(b.graph()).stacks({"x0": np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)})
    mixing = Builder()
    mixing.outputs.append(mixing.op("Softmax", [mixing.input((1, 4))], (1, 4), axis=0))
    module = backend.Module(mixing.graph())
    assert not module.stacks({"x0": np.arange(8, dtype=np.float32).reshape(2, 4)})
    with pytest.raises(DataError, match="1 samples for a batch of 1"):
        module.stacks({"x0": np.zeros((1, 4), np.float32)})


def test_no_rounding_that_turns_over_makes_quantized_samples_look_as_if_they_saw_each_other() -> None:
    quantized = run_pass(Quantize(dtype="bf16"), demo(), Context(calibration=Samples({"image": image(16)["image"]})))
    module, pairs = backend.Module(quantized), image(24)["image"].reshape(12, 2, 1, 28, 28)
    assert all(module.stacks({"image": pair}) for pair in pairs)


# Parameters


def small() -> Graph:
    b = Builder()
    x = b.same("Relu", conv(b, b.input((1, 3, 6, 6)), 4))
    b.outputs.append(linear(b, b.op("Flatten", [x], (1, 144)), 5))
    return b.graph()


def test_parameters_have_the_names_of_the_graph() -> None:
    graph = small()
    names = {name for name, _ in backend.Module(graph).named_parameters()}
    assert names == {name for name, array in graph.params.items() if array.dtype == np.float32}


def test_names_with_dots_are_kept_and_loaded() -> None:
    graph = Graph("g", ("x",), ("y",), (Node("MatMul", ("x", "layer.0.weight"), ("y",), "fc"),), {}, {}, {"": 21})
    from hwopt.ir import TensorType

    types = {"x": TensorType("float32", (1, 2))}
    graph = infer_types(Graph("g", ("x",), ("y",), graph.nodes, types, {"layer.0.weight": np.eye(2, dtype=np.float32)}, {"": 21}))
    module, other = backend.Module(graph), backend.Module(graph)
    with torch.no_grad():
        dict(module.named_parameters())["layer.0.weight"].fill_(3)
    other.load_state_dict(module.state_dict())
    assert other.state_dict()["layer.0.weight"].tolist() == [[3, 3], [3, 3]]
    with pytest.raises(DataError, match="does not fit"):
        other.load_state_dict({"nothing": torch.zeros(1)})


def test_copies_have_values_of_their_own() -> None:
    graph = small()
    module = backend.Module(graph)
    first = next(module.parameters())
    first.requires_grad_(False)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        first.fill_(5)
    other = next(twin.parameters())
    assert not other.requires_grad
    assert (other != 5).all()
    feeds = random_feeds(graph)
    assert torch.equal(twin(feeds)[graph.outputs[0]], backend.Module(graph)(feeds)[graph.outputs[0]])


def test_borders_of_a_clip_pass_gradients() -> None:
    b = Builder()
    b.outputs.append(b.op("Clip", [b.input((4,)), b.floats(0.0), b.floats(6.0)], (4,)))
    x = torch.tensor([-1.0, 0.0, 6.0, 7.0], requires_grad=True)
    (y,) = backend.Module(b.graph())({"x0": x}).values()
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_trained_values_go_back_as_a_recorded_step() -> None:
    graph = small()
    module = backend.Module(graph)
    trained = next(name for name, _ in module.named_parameters())
    with torch.no_grad():
        dict(module.named_parameters())[trained].add_(1)
    after = backend.parameters_to_graph(graph, module, by="distill{epochs=1}")
    assert np.array_equal(after.params[trained], graph.params[trained] + 1)
    stamped = [node.name for node in after.nodes if node.history[-1:] == ("distill{epochs=1}",)]
    assert stamped == [node.name for node in graph.users[trained]]
    assert_like_ort(after, random_feeds(after))


def test_untrained_values_leave_the_graph_as_it_is() -> None:
    graph = small()
    assert backend.parameters_to_graph(graph, backend.Module(graph)) is graph


def test_values_that_are_not_finite_are_refused() -> None:
    graph = small()
    module = backend.Module(graph)
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    with pytest.raises(PassError, match="not finite after training"):
        backend.parameters_to_graph(graph, module)


def palette(integer: bool) -> Graph:
    """x + codebook[indices], the codebook float or int8 behind a DequantizeLinear."""
    b = Builder()
    book = np.array([10, -20, 30, 40], np.int8) if integer else np.array([1, -2, 3, 4], np.float32)
    values = b.op("Gather", [b.param(book), b.param(np.array([0, 0, 2], np.int64))], (3,))
    if integer:
        values = b.op("DequantizeLinear", [values, b.param(np.array(0.1, np.float32)), b.param(np.array(0, np.int8))], (3,))
    b.outputs.append(b.op("Add", [b.input((3,)), values], (3,)))
    return b.graph()


@pytest.mark.parametrize("integer", [False, True])
def test_codebooks_collect_the_gradients_of_their_members(integer: bool) -> None:
    graph = palette(integer)
    module = backend.Module(graph, integers=integer)
    (y,) = module(random_feeds(graph)).values()
    (y * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    (book,) = module.parameters()
    assert book.grad.tolist() == pytest.approx([0.3, 0, 0.4, 0] if integer else [3, 0, 4, 0])


def test_integer_codebooks_are_written_back_rounded_into_their_range() -> None:
    graph = palette(True)
    module = backend.Module(graph, integers=True)
    (book,) = module.parameters()
    with torch.no_grad():
        book.copy_(torch.tensor([10.4, -20.6, 300.0, 40.0]))
    after = backend.parameters_to_graph(graph, module)
    (name,) = dict(module.named_parameters())
    assert after.params[name].dtype == np.int8
    assert after.params[name].tolist() == [10, -21, 127, 40]
    assert_like_ort(after, random_feeds(after))
