"""Preprocessing that becomes the first part of a model, so that its library takes pixels as a camera or a file gives them.

preprocess = parse_preprocess("mean=0.485,0.456,0.406,std=0.229,0.224,0.225,scale=1/255,layout=nhwc")
graph = folded(graph, preprocess)      # uint8[1,224,224,3] instead of float32[1,3,224,224]
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

import numpy as np

from hwopt.errors import UsageError, did_you_mean
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types, onnx_dtype

KEY = "hwopt.preprocess"  # in a graph's metadata: it is kept by every pass and written into model.onnx
LAYOUTS, DTYPES = ("nhwc", "nchw"), ("uint8", "float32")
BY = "preprocess"
HINT = "write --preprocess mean=0.485,0.456,0.406,std=0.229,0.224,0.225,scale=1/255,layout=nhwc"


@dataclass(frozen=True)
class Preprocess:
    """`(pixel * scale - mean) / std` for each channel, on pixels in this layout and element type.

    An empty layout is the model's own; an empty input is the only one with pictures.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 1.0
    layout: str = ""
    dtype: str = "uint8"
    input: str = ""

    def __str__(self) -> str:
        """The text that `parse_preprocess` reads."""
        shown = ((one.name, getattr(self, one.name)) for one in dataclasses.fields(self))
        parts = ((name, value) for name, value in shown if value not in ((), "") and (name, value) != ("scale", 1.0))
        return ",".join(f"{name}={','.join(map(repr, value)) if isinstance(value, tuple) else value}" for name, value in parts)

    @property
    def formula(self) -> str:
        """What is done to a pixel, in words for a header."""
        value = "pixel" if self.scale == 1 else f"pixel * {self.scale:.9g}"
        value = f"{value} - {_numbers(self.mean)}" if any(self.mean) else value
        return f"({value}) / {_numbers(self.std)}" if set(self.std) - {1.0} else value


def _numbers(values: tuple[float, ...]) -> str:
    texts = [f"{value:.9g}" for value in values]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def parse_preprocess(text: str) -> Preprocess:
    """The inverse of `str(preprocess)`. Numbers may be fractions: 1/255. Raises UsageError that names the wrong part."""
    place = f"--preprocess {text}"
    values: dict[str, list[str]] = {}
    key = ""
    for part in text.split(","):
        name, equals, value = part.partition("=")
        key = name.strip() if equals else key
        if key not in Preprocess.__dataclass_fields__:
            known = did_you_mean(key, Preprocess.__dataclass_fields__)
            raise UsageError(f"unknown option {key!r}", place=place, hint=known if key else HINT)
        if equals and key in values:
            raise UsageError(f"{key} is given twice", place=place)
        values.setdefault(key, []).append((value if equals else part).strip())
    mean, std = (tuple(_number(one, place) for one in values.pop(name, ())) for name in ("mean", "std"))
    single = {name: _single(name, texts, place) for name, texts in values.items()}
    scale = _number(single.pop("scale", "1"), place)
    found = Preprocess(mean, std, scale, **single)
    _check(found, place)
    return found


def _number(text: str, place: str) -> float:
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{text!r} is no number", place=place, hint=HINT) from error
    if not np.isfinite(value):
        raise UsageError(f"{text!r} is not finite", place=place)
    return value


def _single(name: str, texts: list[str], place: str) -> str:
    if len(texts) != 1:
        raise UsageError(f"{name} takes one value", place=place, hint=HINT)
    return texts[0]


def _check(found: Preprocess, place: str) -> None:
    if found.layout and found.layout not in LAYOUTS:
        raise UsageError(f"unknown layout {found.layout!r}", place=place, hint=did_you_mean(found.layout, LAYOUTS))
    if found.dtype not in DTYPES:
        raise UsageError(f"pixels of type {found.dtype!r}", place=place, hint=did_you_mean(found.dtype, DTYPES))
    if 0.0 in found.std or found.scale == 0:
        raise UsageError("a std or scale of zero", place=place)


def preprocess_of(graph: Graph) -> Preprocess | None:
    """What was folded into a graph, in full: its input and layout are named."""
    return parse_preprocess(graph.metadata[KEY]) if KEY in graph.metadata else None


def notes_of(graph: Graph) -> dict[str, str]:
    """What the generated header says of the input that takes pixels."""
    found = preprocess_of(graph)
    if found is None or found.input not in graph.inputs:
        return {}
    return {found.input: f"pixels as they are, {found.layout.upper()}; the model computes {found.formula} of them itself"}


def folded(graph: Graph, preprocess: Preprocess) -> Graph:
    """x -> Transpose -> Cast -> Sub -> Mul -> model: the same input by name now takes pixels. Parts that do nothing are left out.

    Exact up to float rounding; the clean passes fold the factors into the first convolution, and the shift where nothing is
    padded. Raises UsageError where the model has no such input or the numbers do not fit its channels.
    """
    if KEY in graph.metadata:
        raise UsageError("the model preprocesses its input already", place=graph.name, hint=f"it has {graph.metadata[KEY]}")
    name = preprocess.input or _picture_input(graph)
    kind, axis = graph.tensor(name), channel_axis(graph.tensor(name))
    if name not in graph.inputs or axis is None or kind.dtype not in ("float32", "float16", "float64"):
        hint = did_you_mean(name, graph.inputs) if name not in graph.inputs else "it takes float pictures with 1, 3 or 4 channels"
        raise UsageError(f"input {name!r} takes {kind}, no pictures", place=f"--preprocess for {graph.name}", hint=hint)
    own = "nchw" if axis == 1 else "nhwc"
    stated = dataclasses.replace(preprocess, layout=preprocess.layout or own, input=name)
    channels = kind.dims[axis]
    for word, values in (("mean", stated.mean), ("std", stated.std)):
        if len(values) not in (0, 1, channels):
            raise UsageError(f"{len(values)} numbers for {channels} channels", place=f"--preprocess {word}")
    return _rewritten(graph, stated, axis, own)


def _picture_input(graph: Graph) -> str:
    found = [name for name in graph.inputs if channel_axis(graph.tensor(name)) is not None]
    if len(found) != 1:
        hint = f"add input=NAME, one of {', '.join(graph.inputs)}"
        raise UsageError(f"{len(found)} inputs take pictures", place=f"--preprocess for {graph.name}", hint=hint)
    return found[0]


def channel_axis(kind: TensorType) -> int | None:
    """Where a static 4-dimensional input has 1, 3 or 4 channels: axis 1 or else 3; None if at neither."""
    if not kind.static or len(kind.dims) != 4:
        return None
    return next((axis for axis in (1, 3) if kind.dims[axis] in (1, 3, 4)), None)


def _rewritten(graph: Graph, stated: Preprocess, axis: int, own: str) -> Graph:
    """The graph behind Transpose, Cast, Sub and Mul, as far as they do something."""
    name, kind = stated.input, graph.tensor(stated.input)
    shape = [1] * 4
    shape[axis] = -1
    mean, std = (np.array(values or neutral, np.float64) for values, neutral in ((stated.mean, 0.0), (stated.std, 1.0)))
    dims, front = kind.dims, _Front(graph, name)
    if stated.layout != own:
        order = (0, 3, 1, 2) if own == "nchw" else (0, 2, 3, 1)
        front.add("Transpose", perm=order)
        dims = tuple(kind.dims[order.index(place)] for place in range(4))
    if stated.dtype != kind.dtype:
        front.add("Cast", to=onnx_dtype(kind.dtype))
    front.add_constant("Sub", (mean / stated.scale).reshape(shape), 0.0, kind.dtype)
    front.add_constant("Mul", (stated.scale / std).reshape(shape), 1.0, kind.dtype)
    return front.before(stated, TensorType(stated.dtype, dims))


class _Front:
    """Nodes that stand before the model, one after the other, each named by what it does."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.edit, self.value = graph, graph.edit(), name
        self.nodes: list[Node] = []
        self.params: dict[str, np.ndarray] = {}

    def add(self, op: str, *operands: str, **attrs: object) -> None:
        named = self.edit.fresh(f"{BY}_{op.lower()}")
        made = self.edit.fresh(f"{named}_out")
        self.nodes.append(Node(op, (self.value, *operands), (made,), named, MappingProxyType(attrs), history=(BY,)))
        self.value = made

    def add_constant(self, op: str, constant: np.ndarray, neutral: float, dtype: str) -> None:
        if (constant != neutral).any():
            name = self.edit.fresh(f"{BY}_{op.lower()}_by")
            self.params[name] = frozen(constant.astype(dtype))
            self.add(op, name)

    def before(self, stated: Preprocess, kind: TensorType) -> Graph:
        """The graph with the input of this type, read by these nodes first. Raises UsageError where that cannot be."""
        graph, name = self.graph, stated.input
        inside = [node.name for node in graph.nodes if name in node.reads and name not in node.inputs]
        if inside or name in graph.outputs:
            reader = f"the subgraph of {inside[0]}" if inside else "an output"
            raise UsageError(f"{name} is read by {reader}", place="--preprocess", hint="change the model's input by hand")
        if not self.nodes:
            raise UsageError("changes nothing", place=f"--preprocess {stated}", hint=HINT)
        behind = (dataclasses.replace(n, inputs=tuple(self.value if i == name else i for i in n.inputs)) for n in graph.nodes)
        changed = dataclasses.replace(
            graph,
            nodes=(*self.nodes, *behind),
            types=MappingProxyType({**graph.types, name: kind}),
            params=MappingProxyType({**graph.params, **self.params}),
            metadata=MappingProxyType({**graph.metadata, KEY: str(stated)}),
        )
        return infer_types(changed)
