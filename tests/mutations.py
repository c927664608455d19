"""Small models and seeded ways to damage them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper

FLOAT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL


def _tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(array, name)


def _info(name: str, dims: list[object] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def _model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], opset: int, inputs: list) -> onnx.ModelProto:
    held = [_tensor(name, array) for name, array in weights.items()]
    body = helper.make_graph(nodes, "seed", inputs, [_info("y", None)], held)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def convolutions(opset: int = 9) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        **{name: np.ones(4, np.float32) for name in ("scale", "bias", "mean", "var")},
        "fc": rng.standard_normal((4, 5)).astype(np.float32),
        "fc_bias": np.zeros(5, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["b"]),
        helper.make_node("Relu", ["b"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Identity", ["f"], ["i"]),
        helper.make_node("Gemm", ["i", "fc", "fc_bias"], ["y"]),
    ]
    return _model(nodes, weights, opset, [_info("x", [1, 3, 8, 8])])


def shapes() -> onnx.ModelProto:
    """Shape -> Gather -> Concat -> Reshape, a dynamic Pad and Slice, and a Constant."""
    weights = {"zero": np.array([0]), "minus": np.array([-1]), "pads": np.array([0, 1, 0, 1]), "start": np.array([0, 1])}
    nodes = [
        helper.make_node("Constant", [], ["end"], value=_tensor("", np.array([2, 4]))),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["rows"]),
        helper.make_node("Concat", ["rows", "minus"], ["target"], axis=0),
        helper.make_node("Pad", ["x", "pads"], ["p"]),
        helper.make_node("Slice", ["p", "start", "end"], ["q"]),
        helper.make_node("Reshape", ["q", "target"], ["y"]),
    ]
    return _model(nodes, weights, 13, [_info("x", [2, 6])])


def branches() -> onnx.ModelProto:
    """An If on a constant, one on an input, each branch with a weight of its own."""

    def branch(name: str, value: float) -> onnx.GraphProto:
        nodes = [helper.make_node("Mul", ["x", "k"], ["m"]), helper.make_node("Add", ["m", "k"], [f"{name}_out"])]
        return helper.make_graph(nodes, name, [], [_info(f"{name}_out", None)], [_tensor("k", np.float32([value]))])

    nodes = [
        helper.make_node("If", ["yes"], ["a"], then_branch=branch("t1", 2), else_branch=branch("e1", 3)),
        helper.make_node("If", ["c"], ["b"], then_branch=branch("t2", 4), else_branch=branch("e2", 5)),
        helper.make_node("Sub", ["a", "b"], ["y"]),
    ]
    return _model(nodes, {"yes": np.array(True)}, 17, [_info("x", [2, 6]), _info("c", [], BOOL)])


def seeds() -> list[onnx.ModelProto]:
    return [convolutions(), convolutions(21), shapes(), branches()]


def damage_bytes(model: onnx.ModelProto, rng: np.random.Generator) -> bytes:
    """Flipped, cut, repeated or exchanged bytes."""
    data = bytearray(model.SerializeToString())
    for _ in range(int(rng.integers(1, 6))):
        at, length = int(rng.integers(0, max(1, len(data)))), int(rng.integers(1, 24))
        kind = int(rng.integers(0, 4))
        if kind == 0:
            data[at : at + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 1 and rng.random() < 0.3:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = rng.bytes(length)
    return bytes(data)


def damage_fields(model: onnx.ModelProto, rng: np.random.Generator) -> bytes:
    """A model that still parses but means something else, or nothing."""
    damaged = onnx.ModelProto()
    damaged.CopyFrom(model)
    for _ in range(int(rng.integers(1, 4))):
        kind = _KINDS[int(rng.integers(0, len(_KINDS)))]
        kind(damaged.graph, damaged, rng)
    return damaged.SerializeToString()


def _pick(items: object, rng: np.random.Generator) -> object:
    return items[int(rng.integers(0, len(items)))] if len(items) else None  # type: ignore[index,arg-type]


_SIZES = (-1, 0, 1, 2, 3, 7, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))


def _size(rng: np.random.Generator) -> int:
    return _SIZES[int(rng.integers(0, len(_SIZES)))]


def _dims(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(graph.initializer, rng)
    if tensor is not None and tensor.dims:
        tensor.dims[int(rng.integers(0, len(tensor.dims)))] = _size(rng)


def _dtype(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(graph.initializer, rng)
    if tensor is not None:
        tensor.data_type = int(rng.integers(0, 30))


def _values(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick([one for one in graph.initializer if one.data_type == onnx.TensorProto.INT64], rng)
    if tensor is not None:
        array = np.array([_size(rng) for _ in range(max(1, int(np.prod(tensor.dims))))], np.int64)
        tensor.raw_data = array.tobytes()


def _input_dim(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    value = _pick(graph.input, rng)
    if value is not None and value.type.tensor_type.shape.dim:
        _pick(value.type.tensor_type.shape.dim, rng).dim_value = _size(rng)


def _operator(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    names = sorted(schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain)
    node = _pick(graph.node, rng)
    if node is not None:
        node.op_type = _pick(names, rng)


def _wire(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Another source for an input: cycles, undefined names, other types."""
    values = ["", "nowhere", "x", *(one.name for one in graph.initializer), *(out for node in graph.node for out in node.output)]
    node = _pick(graph.node, rng)
    if node is not None and node.input:
        node.input[int(rng.integers(0, len(node.input)))] = _pick(values, rng)


def _rename(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(graph.node, rng)
    if node is not None and node.output:
        node.output[0] = _pick(["", "x", "y", "w", "c"], rng)


def _attribute(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    attribute = _pick([one for node in graph.node for one in node.attribute], rng)
    if attribute is None:
        return
    choice = int(rng.integers(0, 4))
    if choice == 0:
        attribute.type = int(rng.integers(0, 15))
    elif choice == 1:
        attribute.name = _pick(["axis", "pads", "group", "dilations", "to", "value", "strides", ""], rng)
    elif choice == 2:
        attribute.ints[:] = [_size(rng) for _ in range(int(rng.integers(0, 5)))]
    else:
        attribute.i = _size(rng)


def _opset(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if model.opset_import:
        model.opset_import[0].version = int(_pick([-5, 0, 1, 5, 7, 9, 11, 13, 18, 21, 25, 28, 99, 1 << 40], rng))
        model.opset_import[0].domain = _pick(["", "", "", "ai.onnx", "ai.onnx.ml", "strange"], rng)


def _drop(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    items = _pick([graph.node, graph.initializer, graph.input, graph.output, model.opset_import], rng)
    if items:
        del items[int(rng.integers(0, len(items)))]


def _repeat(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    items = _pick([graph.node, graph.initializer, graph.input, graph.output], rng)
    if items:
        items.add().CopyFrom(_pick(items, rng))


def _external(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick([one for one in graph.initializer if one.HasField("raw_data")], rng)
    if tensor is not None:
        place = _pick(["weights.bin", "../../etc/passwd", "/etc/passwd", "", "."], rng)
        onnx.external_data_helper.set_external_data(tensor, place, _size(rng), _size(rng))


def _nested(graph: onnx.GraphProto, model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """The same damage inside a branch."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    body = _pick(inner, rng)
    if body is not None:
        _pick([_dims, _dtype, _operator, _wire, _rename, _attribute, _drop, _repeat, _external], rng)(body, model, rng)


_KINDS: list[Callable[[onnx.GraphProto, onnx.ModelProto, np.random.Generator], None]] = [
    _dims, _dtype, _values, _input_dim, _operator, _wire, _rename, _attribute, _opset, _drop, _repeat, _external, _nested,
]  # fmt: skip
