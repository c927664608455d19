"""A student whose integers may be stored as codes, as those of 3 bits are: it trains the integers, and the codes are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hwopt.ir import Graph, Node
from hwopt.recover.palettes import Palette, palettes_of
from hwopt.recover.torch.student import Student


class CodedStudent(Student):
    """DQ(levels[codes]) is DQ(integers): learned like other integers, with step sizes of their own (LSQ)."""

    def __init__(self, graph: Graph, **options: Any) -> None:
        self.whole = graph
        self.coded: dict[str, Palette] = {}
        edit = graph.edit()
        limits = {}
        for one, reader in coded_integers(graph):
            levels = graph.params[one.codebook].reshape(-1)
            value = reader.inputs[0]
            name = edit.param(f"{value}_integers", levels[one.codes].reshape(graph.tensor(value).dims))
            edit.forward(value, name)
            self.coded[name] = one
            used = int(levels[one.codes.min()])
            low, high = int(levels[0]), int(levels[-1])
            limits[name] = (-high if low < 0 and used >= -high else low, high)
        super().__init__(edit.finish("coded"), limits=limits, **options)

    @torch.no_grad()
    def arrays(self) -> dict[str, np.ndarray]:
        found = super().arrays()
        for name, one in self.coded.items():
            lowest = int(self.whole.params[one.codebook].reshape(-1)[0])
            codes = found.pop(name).astype(np.int64) - lowest
            found |= one.stored(self.whole, codes.reshape(one.codes.shape))
        return found


def coded_integers(graph: Graph) -> Iterator[tuple[Palette, Node]]:
    """Palettes of neighbouring integers that only one DequantizeLinear reads, and that."""
    for one in palettes_of(graph):
        levels, value = graph.params[one.codebook].reshape(-1), one.lookup.output
        while len(users := graph.users[value]) == 1 and users[0].op == "Reshape":
            value = users[0].output
        whole = levels.dtype.kind == "i" and np.array_equal(levels, np.arange(len(levels)) + int(levels[0]))
        if whole and len(one.codes) == 1 and len(users) == 1 and users[0].op == "DequantizeLinear" and len(users[0].inputs) == 2:
            yield one, users[0]
