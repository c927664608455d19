"""The static memory plan: where in one arena every temporary lies.

Two buffers share bytes when no kernel needs both. Placing them is dynamic storage allocation, NP-hard; greedy by size (Pisarchyk
and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020) comes close on real models, and other orders closer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hwopt.emit.program import Buffer, Program
from hwopt.ir import numpy_dtype

WORK = 20_000  # buffers placed by chance before the search ends: about a second
ALIGNMENT = 64  # bytes: a cache line, and what TVM's kernels assume of every tensor


@dataclass(frozen=True)
class MemoryPlan:
    """Byte offsets into the arena, by root buffer (an alias lies where its root lies), and how large the arena is."""

    offsets: Mapping[str, int]
    arena_bytes: int


@dataclass(frozen=True)
class Lifetime:
    """A root buffer and the calls between which its bytes must last: written first by `start`, read last by `end`."""

    name: str
    bytes: int
    start: int
    end: int


def bytes_of(buffer: Buffer) -> int:
    return math.prod(buffer.shape) * numpy_dtype(buffer.dtype).itemsize


def rounded(size: int) -> int:
    """`size` bytes up to a whole number of alignments."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Owner(Protocol):
    """What names buffers: a Program, or one that is being read."""

    @property
    def buffers(self) -> Mapping[str, Buffer]: ...


def root_of(program: Owner, name: str) -> str:
    """The buffer whose memory `name` is a view of: itself unless it is an alias."""
    while program.buffers[name].alias:
        name = program.buffers[name].alias
    return name


def delivered(program: Program) -> dict[str, int]:
    """Root -> the output in whose memory it is computed. Roots that are inputs or constants, and second uses, are copied."""
    places: dict[str, int] = {}
    for index, (_, name) in enumerate(program.outputs):
        root = root_of(program, name)
        if program.buffers[root].kind in ("temporary", "output"):
            places.setdefault(root, index)
    return places


def lifetimes(program: Program) -> tuple[Lifetime, ...]:
    """What needs room in the arena, and when: every temporary that is not computed in an output's memory."""
    outside = delivered(program)
    spans: dict[str, tuple[int, int]] = {}
    for index, call in enumerate(program.calls):
        for name in call.args:
            root = root_of(program, name)
            if program.buffers[root].kind in ("temporary", "output") and root not in outside:
                spans[root] = (spans.get(root, (index, index))[0], index)
    return tuple(Lifetime(name, bytes_of(program.buffers[name]), *span) for name, span in spans.items())


def plan_memory(program: Program) -> MemoryPlan:
    """The smallest of several greedy placements: largest first, by when they are needed, then both with some chance in it.

    Stops at a placement that meets the bound; the chance is seeded, so equal programs get equal plans.
    """
    spans, bound = lifetimes(program), least_bytes(program)
    best: MemoryPlan | None = None
    for order in _orders(spans):
        plan = _place(order)
        if best is None or plan.arena_bytes < best.arena_bytes:
            best = plan
        if best.arena_bytes <= bound:
            break
    return best or MemoryPlan({}, 0)


def _orders(spans: Sequence[Lifetime]) -> Iterator[list[Lifetime]]:
    yield sorted(spans, key=lambda span: (-span.bytes, span.start, span.name))
    yield sorted(spans, key=lambda span: (span.start, -span.bytes, span.name))
    chance = random.Random(0)
    for _ in range(min(400, WORK // max(1, len(spans)))):
        weights = {span.name: span.bytes * chance.uniform(0.3, 1.0) for span in spans}
        yield sorted(spans, key=lambda span: (-weights[span.name], span.name))


def least_bytes(program: Program) -> int:
    """A bound that no plan can beat: the most bytes that one call needs at the same time."""
    spans = lifetimes(program)
    changes = np.zeros(len(program.calls) + 1, np.int64)
    for span in spans:
        changes[span.start] += rounded(span.bytes)
        changes[span.end + 1] -= rounded(span.bytes)
    return int(np.cumsum(changes).max(initial=0))


def _place(order: Sequence[Lifetime]) -> MemoryPlan:
    """Each buffer at the lowest offset where it fits between those already placed that live at the same time."""
    starts, ends = (np.array([getattr(span, field) for span in order], np.int64) for field in ("start", "end"))
    offsets = np.zeros(len(order), np.int64)
    sizes = np.array([rounded(span.bytes) for span in order], np.int64)
    for index in range(len(order)):
        alive = np.flatnonzero((starts[:index] <= ends[index]) & (ends[:index] >= starts[index]))
        taken = sorted(zip(offsets[alive].tolist(), sizes[alive].tolist(), strict=True))
        offsets[index] = _first_gap(taken, int(sizes[index]))
    arena = int((offsets + sizes).max(initial=0))
    return MemoryPlan({span.name: int(offset) for span, offset in zip(order, offsets, strict=True)}, arena)


def _first_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    free = 0
    for offset, length in taken:
        if offset - free >= size:
            break
        free = max(free, offset + length)
    return free
