"""Global pooling on the way out of a convolution: results are summed up, and only their mean is written.

A task takes all positions of an image for its channels, so that nobody else adds to their sums:

    for each channel tile:
        sums = 0
        for each position tile: products, the steps before Mean, sums += results
        sums / count, the steps behind Mean, store
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hwopt.backends.tvm.kernels import schedule
from hwopt.backends.tvm.kernels.code import Code, Value, cast, load, splat
from hwopt.backends.tvm.kernels.depthwise import is_depthwise
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.backends.tvm.kernels.geometry import geometry
from hwopt.backends.tvm.kernels.spec import ConvSpec, Mean, Step

POSITIONS = 256  # of an image: larger ones are cut in blocks, for the caches and for more cores


def reason_against(spec: Any) -> str:
    """Why a kernel should not average its results itself, or ""."""
    if not any(isinstance(step, Mean) for step in spec.epilogue):
        return ""
    if not isinstance(spec, ConvSpec) or is_depthwise(spec) or spec.groups > 1:
        return "only convolutions without groups average their results"
    if spec.out_height * spec.out_width > POSITIONS:
        return f"the mean is over more than {POSITIONS} positions"
    shape = geometry(spec)
    if shape.padded and schedule.rows_in_workspace(shape, 1) < shape.rows:
        return "the padded image does not fit the workspace"
    return ""


def divided(steps: tuple[Step, ...]) -> tuple[tuple[Step, ...], Mean | None, tuple[Step, ...]]:
    """The steps before Mean, it, and those behind; no Mean and nothing behind where there is none."""
    index = next((place for place, step in enumerate(steps) if isinstance(step, Mean)), len(steps))
    mean = steps[index] if index < len(steps) else None
    return steps[:index], mean if isinstance(mean, Mean) else None, steps[index + 1 :]


@dataclass(frozen=True)
class Sums:
    """One total for every channel of a tile, int32 or float32."""

    buffer: Value
    dtype: str

    @classmethod
    def start(cls, code: Code, vectors: int, lanes: int, dtype: str) -> Sums:
        buffer = code.alloc("sums", vectors * lanes, dtype)
        for vector in range(vectors):
            code.store(buffer, vector * lanes, splat(0 if dtype == "int32" else 0.0, lanes, dtype), lanes)
        return cls(buffer, dtype)

    def add(self, code: Code, at: int, value: Value, lanes: int) -> None:
        value = cast(value, "int32", lanes) if self.dtype == "int32" else value
        code.store(self.buffer, at, load(self.buffer, at, lanes) + value, lanes)

    def mean(self, at: int, count: int, mean: Mean, lanes: int) -> Value:
        """float32, of `count` results."""
        total = load(self.buffer, at, lanes)
        if self.dtype == "int32":
            total = cast(total - splat(count * mean.zero_point, lanes, "int32"), "float32", lanes)
        return total * splat(mean.scale / count, lanes)


def finish(code: Code, sums: Sums, at: int, count: int, mean: Mean, epilogue: Epilogue, place: Place, lanes: int) -> Value:
    """What is written for the channels from `place` on: the mean and the steps behind it."""
    value = code.bind("mean", sums.mean(at, count, mean, lanes))
    return epilogue.apply(code, value, place, epilogue.per_channel(code, place.channel, lanes), lanes, False)
