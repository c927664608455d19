"""The largest of bfloat16 values without widening them: their bits, made to count like integers, are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hwopt.analysis.bfloat16 import narrows, widened
from hwopt.analysis.regions import Region
from hwopt.backends.tvm.integer import Lowering, Window, in_image, window_of
from hwopt.backends.tvm.layout import dims_of


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
