"""Constants as they ship: one blob, every tensor on a 64-byte boundary, equal bytes stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwopt.emit.memory import ALIGNMENT, rounded
from hwopt.emit.program import Program


@dataclass(frozen=True)
class Weights:
    """`offsets[buffer]` into `blob`. `bytes` is what the constants need, without what alignment adds."""

    blob: bytes
    offsets: Mapping[str, int]
    bytes: int


def pack_weights(program: Program) -> Weights:
    """In the order of the program's buffers, so that equal programs give equal bytes."""
    return pack_shared((program,))[0]


def pack_shared(programs: Sequence[Program]) -> tuple[Weights, ...]:
    """One blob for several programs; each has offsets of its own into it."""
    blob, known, needed = bytearray(), {}, 0
    found: list[dict[str, int]] = []
    for program in programs:
        found.append({})
        for name, buffer in program.buffers.items():
            if buffer.kind != "constant" or buffer.alias or buffer.data is None:
                continue
            raw = np.ascontiguousarray(buffer.data).tobytes()
            digest = hashlib.sha256(raw).digest()
            if digest not in known:
                known[digest] = len(blob)
                needed += len(raw)
                blob += raw.ljust(rounded(len(raw)), b"\0")
            found[-1][name] = known[digest]
    return tuple(Weights(bytes(blob), offsets, needed) for offsets in found)


def assembly(name: str) -> str:
    """A source file that makes `<name>_weights.bin` the read-only symbol `<name>_weights`, without a detour over text."""
    return f"""    .section .rodata.{name}_weights,"a",%progbits
    .balign {ALIGNMENT}
    .global {name}_weights
    .hidden {name}_weights
    .type {name}_weights, %object
{name}_weights:
    .incbin "{name}_weights.bin"
    .byte 0
    .size {name}_weights, . - {name}_weights
    .section .note.GNU-stack,"",%progbits
"""


def weights_array(name: str, blob: bytes) -> str:
    """The same symbol as C11, for assemblers without .incbin; compiling it takes long where weights are large."""
    rows = (", ".join(map(str, blob[at : at + 24])) for at in range(0, len(blob), 24))
    body = ",\n    ".join(rows) or "0"
    return f"_Alignas({ALIGNMENT}) const unsigned char {name}_weights[{len(blob)} + 1] = {{\n    {body}}};\n"
