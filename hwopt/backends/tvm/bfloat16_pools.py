"""The largest of bfloat16 values without widening them: their bits, made to count like integers, are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hwopt.analysis.bfloat16 import narrows, widened
from hwopt.analysis.regions import Region
from hwopt.backends.tvm.integer import Lowering
from hwopt.backends.tvm.layout import dims_of
from hwopt.ir import Graph, Node


def emit(lowering: Lowering, region: Region) -> bool:
    """Emit bfloat16 -> MaxPool -> bfloat16 as one kernel; False for every other region."""
    graph, anchor = lowering.graph, region.anchor
    if anchor.op != "MaxPool" or not widened(graph, anchor.inputs[0]):
        return False
    if len(region.epilogue) != 1 or not narrows(graph, region.epilogue[0]) or len(graph.tensor(anchor.output).dims) < 3:
        return False
    data = lowering.values.get(widened(graph, anchor.inputs[0]), True)
    window = window_of(graph, anchor, tuple(dims_of(data)[1:-1]))
    if window is None:
        return False
    lowering.values.put(region.output, lowering.builder.emit_te(_largest(window), data, primfunc_name_hint="bfloat16_max"), True)
    return True


@dataclass(frozen=True)
class Window:
    """A pooling window over the image; `pads` are all begins, then all ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    def extents(self, image: Sequence[int]) -> list[int]:
        count = len(self.kernel)
        rooms = [
            image[i] + self.pads[i] + self.pads[count + i] - (self.kernel[i] - 1) * self.dilations[i] - 1 for i in range(count)
        ]
        return [room // stride + 1 for room, stride in zip(rooms, self.strides, strict=True)]

    def place(self, out: Sequence[Any], inside: Sequence[Any]) -> list[Any]:
        """Where an element of the window lies in the image (outside of it in the padding)."""
        count = len(self.kernel)
        return [out[i] * self.strides[i] + inside[i] * self.dilations[i] - self.pads[i] for i in range(count)]


def window_of(graph: Graph, node: Node, image: Sequence[int]) -> Window | None:
    kernel = tuple(node.attr("kernel_shape"))
    count = len(kernel)
    if node.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or len(node.outputs) > 1:
        return None
    window = Window(
        kernel, tuple(node.attr("strides", (1,) * count)), tuple(node.attr("pads", (0,) * (2 * count))),
        tuple(node.attr("dilations", (1,) * count)),
    )  # fmt: skip
    return window if window.extents(image) == list(graph.tensor(node.output).dims[2:]) else None


def in_image(place: Sequence[Any], image: Sequence[Any], window: Window) -> Any:
    """The condition that an element is none of the padding."""
    from tvm import tirx

    if not any(window.pads):
        return None
    return tirx.all(*(tirx.all(at >= 0, at < size) for at, size in zip(place, image, strict=True)))


def _largest(window: Window) -> Callable[..., Any]:
    from tvm import te, tirx

    def exchanged(bits: Any) -> Any:
        """Sign and magnitude <-> two's complement: its own inverse. NaN counts as more than infinity."""
        return bits ^ ((bits >> tirx.const(15, "int16")) & tirx.const(0x7FFF, "int16"))

    def compute(data: Any) -> Any:
        batch, *image, channels = data.shape
        axes = [te.reduce_axis((0, size), f"k{index}") for index, size in enumerate(window.kernel)]

        def element(*index: Any) -> Any:
            place = window.place(index[1:-1], axes)
            inside = in_image(place, image, window)
            key = exchanged(tirx.reinterpret("int16", data(index[0], *place, index[-1])))
            return te.max(key if inside is None else tirx.if_then_else(inside, key, tirx.min_value("int16")), axis=axes)

        largest = te.compute((batch, *window.extents([int(size) for size in image]), channels), element, "largest")
        return te.compute(largest.shape, lambda *index: tirx.reinterpret("bfloat16", exchanged(largest(*index))), "bits")

    return compute
