"""Max, average and global pools: vectors run along the channels, windows are clipped to the image, nothing is copied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from hwopt.backends.tvm.kernels import bfloat16
from hwopt.backends.tvm.kernels.code import Code, Value, cast, function, load, pieces, splat
from hwopt.backends.tvm.kernels.epilogue import LIMITS, Epilogue, Place
from hwopt.backends.tvm.kernels.micro import fused_multiply_add
from hwopt.backends.tvm.kernels.schedule import SERIAL_MACS, Schedule, split
from hwopt.backends.tvm.kernels.spec import PoolSpec
from hwopt.target import MicroKernel


def default_schedule(spec: PoolSpec, micro: MicroKernel, cores: int = 1) -> Schedule:
    """Four vectors of channels at once; a task is one row, or one channel tile where there is a single row."""
    tiles = -(-spec.channels // (4 * micro.lanes))
    parallel = cores > 1 and spec.reads >= SERIAL_MACS
    block = 1 if parallel and spec.batch * spec.out_height < cores else tiles
    return Schedule(1, 1, 4, 1, 1, spec.out_width, block, parallel)


@dataclass(frozen=True)
class Window:
    """The taps of one output position that lie in the image: the first ones and how many."""

    top: Value
    rows: Value
    left: Value
    columns: Value


def _as_block(built: tirx.PrimFunc) -> tirx.PrimFunc:
    """TVM looks into kernels of one operand for reshapes, and fails over those that are no block."""
    from tvm import s_tir

    whole = s_tir.SBlock([], [], [], "root", built.body)
    return built.with_body(s_tir.SBlockRealize([], tirx.const(True, "bool"), whole))


class Pool:
    """One kernel under construction."""

    def __init__(self, spec: PoolSpec, schedule: Schedule, micro: MicroKernel) -> None:
        self.spec, self.schedule, self.micro = spec, schedule, micro
        size = spec.batch * spec.out_height * spec.out_width * spec.channels
        self.integer = spec.data_dtype in LIMITS
        narrow = spec.data_dtype == "bfloat16"  # compared and added as what they stand for
        self.passes = spec.function == "max" and not spec.epilogue and spec.data_dtype == spec.out_dtype and not narrow
        self.kind = spec.data_dtype if self.passes else "int32" if self.integer else "float32"  # of the running result
        self.data = tirx.decl_buffer((spec.batch * spec.height * spec.width * spec.channels,), spec.data_dtype, "data")
        self.out = tirx.decl_buffer((size,), spec.out_dtype, "out")
        fused = fused_multiply_add(micro)
        self.epilogue = Epilogue(spec.epilogue, "float32", spec.out_dtype, spec.channels, spec.batch, size, fused)

    def build(self, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(data, *epilogue tensors, out)."""
        code, spec = Code(), self.spec
        width = self.schedule.vectors * self.micro.lanes
        tiles = -(-spec.channels // width)
        block = min(self.schedule.block_tiles, tiles)
        blocks = -(-tiles // block)

        def task(inner: Code, number: Value) -> None:
            first = tirx.floormod(number, blocks) * block if blocks > 1 else 0
            row = tirx.floordiv(number, blocks) if blocks > 1 else number
            whole = spec.channels // width
            many = whole if blocks == 1 else tirx.Max(0, tirx.Min(block, whole - first))
            inner.loop("tile", many, lambda some, tile: self._row(some, row, tile * width, width), start=first)
            if spec.channels % width:
                here = True if blocks == 1 else tirx.GT(first + block, whole)
                inner.when(here, lambda some: self._row(some, row, whole * width, spec.channels % width))

        code.loop("task", spec.batch * spec.out_height * blocks, task, parallel=self.schedule.parallel)
        return _as_block(function(symbol, [self.data, *self.epilogue.parameters, self.out], code))

    def _row(self, code: Code, row: Value, channel: Value, count: int) -> None:
        """One output row (batch and height together) for `count` channels from `channel` on: windows in the image have as many
        taps as the kernel, so that their loops unroll."""
        y, image = split(row, self.spec.out_height)
        first, last = self._inside(0)
        whole = tirx.And(tirx.GE(y, first), tirx.LT(y, last))
        code.when(
            last - first == self.spec.out_height or whole,
            lambda inner: self._columns(inner, row, (y, image), (0, self.spec.kernel[0]), channel, count),
            lambda inner: self._columns(inner, row, (y, image), self._window(inner, y, 0), channel, count),
        )

    def _columns(
        self, code: Code, row: Value, at: tuple[Value, Value], down: tuple[Value, Value], channel: Value, count: int
    ) -> None:
        """The positions of a row, `at` (y, image): at the left border, in the image, at the right border."""
        spec, (y, image) = self.spec, at
        first, last = self._inside(1)
        for begin, end, whole in ((0, first, False), (first, last, True), (last, spec.out_width, False)):

            def column(inner: Code, x: Value, whole: bool = whole) -> None:
                across = (0, spec.kernel[1]) if whole else self._window(inner, x, 1)
                flat = (row * spec.out_width + x) * spec.channels + channel
                origin = (image * spec.height + y * spec.strides[0] - spec.pads[0], x * spec.strides[1] - spec.pads[1])
                self._position(inner, Place(flat, channel, image), origin, Window(*down, *across), count)

            code.loop("column", end - begin, column, start=begin)

    def _inside(self, axis: int) -> tuple[int, int]:
        """The first position whose window lies in the image, and the one behind the last."""
        spec, size, out = self.spec, (self.spec.height, self.spec.width)[axis], (self.spec.out_height, self.spec.out_width)[axis]
        reach = (spec.kernel[axis] - 1) * spec.dilations[axis]
        first = min(out, -(-spec.pads[axis] // spec.strides[axis]))
        return first, max(first, min(out, (size - 1 - reach + spec.pads[axis]) // spec.strides[axis] + 1))

    def _window(self, code: Code, position: Value, axis: int) -> tuple[Value, Value]:
        """The first tap inside of the image and how many there are."""
        spec, size = self.spec, (self.spec.height, self.spec.width)[axis]
        kernel, dilation = spec.kernel[axis], spec.dilations[axis]
        start = position * spec.strides[axis] - spec.pads[axis]
        first = tirx.Max(0, tirx.floordiv(dilation - 1 - start, dilation))
        last = tirx.Min(kernel, tirx.floordiv(size - 1 - start, dilation) + 1)
        first = code.bind("first", first)
        return first, code.bind("taps", last - first)

    def _position(self, code: Code, place: Place, origin: tuple[Value, Value], window: Window, count: int) -> None:
        """One output position: the window in registers, then the epilogue."""
        spec = self.spec
        widest = self.micro.lanes * (4 if self.passes and self.integer else 1)
        parts = list(pieces(count, widest))
        totals = [code.alloc("total", lanes, self.kind) for _, lanes in parts]
        for total, (_, lanes) in zip(totals, parts, strict=True):
            code.store(total, 0, splat(self._start(), lanes, self.kind), lanes)

        def vertical(outer: Code, ky: Value) -> None:
            def horizontal(inner: Code, kx: Value) -> None:
                line, column = origin[0] + ky * spec.dilations[0], origin[1] + kx * spec.dilations[1]
                base = (line * spec.width + column) * spec.channels + place.channel
                for total, (offset, lanes) in zip(totals, parts, strict=True):
                    value = self._operand(load(self.data, base + offset, lanes), lanes)
                    inner.store(total, 0, self._combine(load(total, 0, lanes), value), lanes)

            outer.loop("across", window.columns, horizontal, start=window.left)

        code.loop("down", window.rows, vertical, start=window.top)
        share = self._share(code, window)
        for total, (offset, lanes) in zip(totals, parts, strict=True):
            at = Place(place.flat + offset, place.channel + offset, place.image)
            code.store(self.out, at.flat, self._result(code, load(total, 0, lanes), (window, share), at, lanes), lanes)

    def _operand(self, value: Value, lanes: int) -> Value:
        """Data as they are compared or added."""
        if self.spec.data_dtype == "bfloat16":
            return bfloat16.widen(value, lanes)
        return cast(value, "int32", lanes) if self.integer and not self.passes else value

    def _start(self) -> Any:
        if self.spec.function == "average":
            return 0 if self.integer else 0.0
        return LIMITS[self.spec.data_dtype][0] if self.integer else -math.inf

    def _combine(self, total: Value, value: Value) -> Value:
        return total + value if self.spec.function == "average" else tirx.Max(total, value)

    def _share(self, code: Code, window: Window) -> Value:
        """1 / the places that an average divides by; nothing for a maximum."""
        if self.spec.function == "max":
            return None
        if self.spec.include_pads or (isinstance(window.rows, int) and isinstance(window.columns, int)):
            return 1.0 / (self.spec.kernel[0] * self.spec.kernel[1])
        return code.bind("share", tirx.Div(tirx.const(1.0, "float32"), tirx.Cast("float32", window.rows * window.columns)))

    def _result(self, code: Code, value: Value, seen: tuple[Window, Value], place: Place, lanes: int) -> Value:
        """The pool's value, dequantized where it leaves its dtype, and the epilogue; `seen` is the window and 1 / its places."""
        spec, (window, share) = self.spec, seen
        if self.passes:
            return value
        average = spec.function == "average"
        if self.integer:
            zeros = spec.zero_point * (window.rows * window.columns if average else 1)
            value = cast(value - splat(zeros, lanes, "int32"), "float32", lanes)
            value = value * splat(spec.scale * share if average else spec.scale, lanes)
        elif average:
            value = value * splat(share, lanes)
        shared = self.epilogue.per_channel(code, place.channel, lanes)
        return self.epilogue.apply(code, code.bind("value", value), place, shared, lanes, False)
