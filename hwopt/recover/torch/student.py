"""The graph as it is trained: float masters behind integer weights, learned step sizes, biases that follow them.

Forward, the student computes what the graph with its written-back parameters will: weights and biases are rounded each time.
(But for the few that are made smaller at the end, where sums of products no longer fit 16 bits: see analysis.narrow.)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from hwopt.analysis.narrow import fitted
from hwopt.backends._torch_call import Tensor
from hwopt.backends._torch_quant import HAIR
from hwopt.backends.torch import Module, to_array
from hwopt.errors import PassError
from hwopt.ir import Graph
from hwopt.recover.steps import Master, paired, steps_of

NARROW = (torch.bfloat16, torch.float16)  # too coarse for small steps: trained as float32
NOTHING: Mapping[str, tuple[int, int]] = MappingProxyType({})
SMALLEST = 2.0**-10  # of its first value that a step size may become


class Student(Module):
    """A Module whose integer weights w = s * round(clip(v / s)) are trained as v, with s where `scales` says so.

    Step sizes get the gradient of LSQ: with rounding straight through behind the clip, autograd finds it; here it is scaled by
    g = 1 / sqrt(N * Qp). Statistics of a BatchNormalization are buffers: they stay, and it computes as in inference, so that
    what is trained is what ships. `keep_zeros` leaves weights at zero that are zero.
    """

    def __init__(
        self, graph: Graph, *, scales: bool = True, keep_zeros: bool = False,
        limits: Mapping[str, tuple[int, int]] = NOTHING,
    ) -> None:  # fmt: skip
        super().__init__(graph, scales=scales, integers=True)
        self.quantizers = steps_of(graph, learn=scales, limits=limits)
        self.paired = dict(paired(graph, self.quantizers.masters))
        self.zeros: dict[str, Tensor] = {}
        self._narrow: dict[str, torch.dtype] = {}
        self._settle()
        self._first = {name: self.value_of(name).detach().clone() for name in self.quantizers.learned}
        for name, factor in self.quantizers.learned.items():
            self.value_of(name).register_hook(lambda gradient, factor=factor: gradient * factor)
        if keep_zeros:
            sizes = ((name, one) for name, one in self.named_parameters() if one.ndim > 1)
            self.zeros = {name: (one.detach() != 0).to(one.dtype) for name, one in sizes}

    def _settle(self) -> None:
        """Masters in place of integers; what is not learned becomes a buffer."""
        for name in tuple(self.latent):
            if name not in self.quantizers.masters:
                self._freeze(name)
        self.latent = frozenset(self.quantizers.masters)
        steps = {node.inputs[1] for node in self.graph.nodes if node.op in ("QuantizeLinear", "DequantizeLinear")}
        for name in steps - set(self.quantizers.learned):
            self._freeze(name)
        self._narrow = {name: one.dtype for name, one in self.named_parameters() if one.dtype in NARROW}
        for name in self._narrow:
            self._parameters[name] = torch.nn.Parameter(self.value_of(name).detach().float())
        for master in self.quantizers.masters.values():
            integers = to_array(self.value_of(master.name)).astype(np.float64)
            wide = torch.from_numpy(integers).to(torch.float64)
            value = (wide - self._offset(master, wide)) * self._step(master, wide).detach().double()
            kind = torch.float64 if self.graph.tensor(master.name).dtype == "int32" else torch.float32
            self._parameters[master.name] = torch.nn.Parameter(value.to(kind))

    def _freeze(self, name: str) -> None:
        parameter = self._parameters.pop(name, None)
        if parameter is not None:
            array = self.graph.params[name]
            self._buffers[name] = parameter.detach().to(torch.int64) if array.dtype.kind in "iu" else parameter.detach()

    def value_of(self, name: str) -> Tensor:
        """A parameter or buffer by its name."""
        found: Tensor | None = self._parameters.get(name)
        found = self._buffers.get(name) if found is None else found
        if found is None:
            raise PassError("has no values", place=name)
        return found

    def scale(self, name: str) -> Tensor:
        """A step size as it is now: learned, equal to another one, or the product of two, in its own shape."""
        if name in self.quantizers.products:
            one, other = (self.scale(part) for part in self.quantizers.products[name])
            return (one.reshape(-1) * other.reshape(-1)).reshape(self.graph.params[name].shape)
        return self.value_of(self.quantizers.tied.get(name, name))

    def _start(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        values = super()._start(feeds)
        for name, kind in self._narrow.items():
            values[name] = values[name].to(kind)
        for name in (*self.quantizers.tied, *self.quantizers.products):
            values[name] = self.scale(name)
        return values

    def _grid(self, name: str, latent: Tensor) -> Tensor:
        master = self.quantizers.masters[name]
        offset = self._offset(master, latent)
        low, high = master.low - offset - HAIR, master.high - offset + HAIR  # rounded, they are the borders
        steps = torch.clamp(latent / self._step(master, latent), low, high)
        return self.rounding(steps) + offset

    def _step(self, master: Master, like: Tensor) -> Tensor:
        """The step size in a shape that divides the parameter."""
        if master.unit:
            return torch.tensor(master.unit, dtype=like.dtype)
        return _spread(self.scale(master.scale), master, like).to(like.dtype)

    def _offset(self, master: Master, like: Tensor) -> Tensor:
        if master.unit or not master.zero_point:
            return torch.zeros((), dtype=like.dtype)
        return _spread(self.value_of(master.zero_point), master, like).to(like.dtype)

    @torch.no_grad()
    def constrain(self) -> None:
        """After a step: step sizes stay positive, zeros stay zero."""
        for name, first in self._first.items():
            self.value_of(name).clamp_(min=first * SMALLEST)
        for name, mask in self.zeros.items():
            self.value_of(name).mul_(mask)

    def _integers(self, name: str) -> np.ndarray:
        """A master on its grid, where sums of products still fit 16 bits if they did before."""
        latent = self.value_of(name)
        steps = to_array(self._grid(name, latent))
        if name not in self.paired:
            return steps
        exact = to_array(latent / self._step(self.quantizers.masters[name], latent))
        return fitted(exact, steps, self.paired[name])

    @torch.no_grad()
    def arrays(self) -> dict[str, np.ndarray]:
        """What the graph's parameters are now; integers as floats with integer values."""
        found = {name: to_array(one) for name, one in self.named_parameters()}
        found |= {name: self._integers(name) for name in self.quantizers.masters}
        return found | {name: to_array(self.scale(name)) for name in (*self.quantizers.tied, *self.quantizers.products)}


def _spread(vector: Tensor, master: Master, like: Tensor) -> Tensor:
    """Along the axis of its DequantizeLinear, or in blocks along it."""
    if vector.numel() == 1 or not like.ndim:
        return vector.reshape(())
    axis = master.reader.attr("axis", 1) % like.ndim
    if vector.ndim == 1:
        return vector.reshape(-1, *(1,) * (like.ndim - 1 - axis))
    block = master.reader.attr("block_size", 0) or -(-like.shape[axis] // vector.shape[axis])
    return vector.repeat_interleave(block, axis).narrow(axis, 0, like.shape[axis])


def written(graph: Graph, arrays: Mapping[str, np.ndarray], by: str) -> Graph:
    """The graph with these parameters; whoever reads a changed one is stamped with `by`. The same graph if none changed.

    Raises PassError for values that are not finite and step sizes that are not positive.
    """
    steps = {node.inputs[1] for node in graph.nodes if node.op in ("QuantizeLinear", "DequantizeLinear")}
    edit, touched = graph.edit(), set()
    for name, array in arrays.items():
        if not np.isfinite(array.astype(np.float64)).all() or (name in steps and not (array > 0).all()):
            raise PassError(f"{name} means nothing after training", place=by, hint="lower the learning rate")
        typed = array.astype(graph.params[name].dtype)
        if typed.tobytes() != graph.params[name].tobytes():
            edit.set_param(name, typed)
            touched.add(name)
    for node in graph.nodes:
        if touched.intersection(node.reads):
            edit.replace(node)
    return edit.finish(by)
