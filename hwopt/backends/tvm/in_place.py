"""Residuals in place: a kernel that adds a value which nobody reads afterwards writes its results over it."""

from __future__ import annotations

import dataclasses

from hwopt.backends.tvm.kernels.code import OVERWRITES
from hwopt.backends.tvm.read import Reading
from hwopt.emit.memory import bytes_of, root_of
from hwopt.emit.program import Buffer, Call


def in_place(found: Reading) -> Reading:
    """The calls with results that are views of what they overwrite. Changes `found`."""
    ends = {root_of(found, name): index for index, call in enumerate(found.calls) for name in call.args}
    kept = {root_of(found, name) for _, name in found.outputs}
    for index, call in enumerate(found.calls):
        attributes = found.functions[call.symbol].attrs
        place = attributes.get(OVERWRITES) if attributes else None
        if place is not None and _dead(found, call, int(place), index, ends, kept):
            source = root_of(found, call.args[int(place)])
            ends[source] = ends.pop(call.args[-1])
            _view(found, call.args[-1], source)
    return found


def _dead(found: Reading, call: Call, place: int, index: int, ends: dict[str, int], kept: set[str]) -> bool:
    """True if the result may lie where the argument lies: temporaries of one size, of which the argument is used no more."""
    source, result = root_of(found, call.args[place]), call.args[-1]
    others = [root_of(found, name) for position, name in enumerate(call.args) if position != place]
    before, after = found.buffers[source], found.buffers[result]
    passing = before.kind == after.kind == "temporary" and not kept & {source, result} and not after.alias
    return passing and bytes_of(before) == bytes_of(after) and ends[source] == index and source not in others


def _view(found: Reading, name: str, source: str) -> None:
    def moved(buffer: Buffer) -> bool:
        return buffer.name == name or buffer.alias == name

    views = {key: dataclasses.replace(buffer, alias=source) for key, buffer in found.buffers.items() if moved(buffer)}
    found.buffers.update(views)
