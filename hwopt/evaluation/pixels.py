"""Inputs that are pictures: where their channels are, and how their numbers become 0 to 1 and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwopt.errors import DataError
from hwopt.io.preprocess import channel_axis
from hwopt.ir import Graph
from hwopt.samples import Samples


@dataclass(frozen=True)
class Pixels:
    """One input whose numbers are brightnesses from 0 to `white`."""

    name: str
    axis: int  # of the channels, with the samples in front: 1 or 3
    white: float
    whole: bool  # integers

    def unit(self, array: np.ndarray) -> np.ndarray:
        """[samples, height, width, channels] from 0 to 1, float32."""
        moved = np.moveaxis(array, self.axis, -1)
        return np.ascontiguousarray(moved, np.float32) / np.float32(self.white)

    def back(self, unit: np.ndarray, like: np.ndarray) -> np.ndarray:
        """The inverse, cut to 0 and 1, rounded where the input takes integers; in the layout and type of `like`."""
        values = np.moveaxis(np.clip(unit, 0, 1) * np.float32(self.white), -1, self.axis)
        return np.ascontiguousarray(np.rint(values) if self.whole else values, like.dtype)


def pixels_of(graph: Graph, samples: Samples) -> Pixels:
    """The only input with pictures. Raises DataError with the reason where there is none or its numbers are no brightnesses."""
    found = [name for name in graph.inputs if channel_axis(graph.tensor(name)) is not None]
    if len(found) != 1:
        raise DataError(f"{len(found)} inputs take pictures, [batch, 1 or 3, height, width] or the like", place=graph.name)
    name, kind = found[0], graph.tensor(found[0])
    axis = channel_axis(kind) or 1
    if kind.dims[axis] == 4 or ("float" not in kind.dtype and kind.dtype != "uint8"):
        raise DataError(f"input {name!r} takes {kind}, no gray or RGB pixels", place=graph.name)
    if kind.dtype == "uint8":
        return Pixels(name, axis, 255.0, True)
    array = samples.arrays[name]
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 255:
        hint = "give --preprocess mean=..,std=.. and the pixels as data"
        raise DataError(f"input {name!r} ranges from {low:.3g} to {high:.3g}: no brightnesses", place=samples.source, hint=hint)
    return Pixels(name, axis, 255.0 if high > 1 else 1.0, False)
