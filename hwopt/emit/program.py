"""A compiled model before it becomes files: kernels in machine code, the order to call them in, and their buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Buffer:
    """A dense tensor in memory, C order. `kind`: input, output, constant (has `data`) or temporary.

    `alias` names the buffer whose bytes this one is another view of (a Reshape); its own memory is then never allocated.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    data: np.ndarray | None = None
    alias: str = ""


@dataclass(frozen=True)
class Call:
    """One kernel call: `symbol(args...)`, the results last (`results` of them). `label` says which nodes it computes."""

    symbol: str
    args: tuple[str, ...]
    results: int = 1
    label: str = ""
    regions: tuple[str, ...] = ()  # of the graph, by name, where the compiler knows


@dataclass(frozen=True, eq=False)
class Program:
    """Static shapes, one function. `inputs` and `outputs` are (name in the model, buffer)."""

    name: str
    buffers: Mapping[str, Buffer]
    calls: tuple[Call, ...]
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    objects: tuple[bytes, ...]  # relocatable object files with the kernels, in TVM's packed calling convention
    scratch_bytes: int = 0  # of temporaries that a kernel asks the runtime for, at most, when it runs serially
    sources: Mapping[str, str] = field(default_factory=dict)  # C files of its own, compiled and shipped with the driver
    provides: tuple[str, ...] = ()  # functions in them that kernels call
    exports: tuple[str, ...] = ()  # functions in them that others may call
    notes: Mapping[str, str] = field(default_factory=dict)  # what the header says of an input or output, by its name in the model
