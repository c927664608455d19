"""A student whose palettes are trained by differentiable k-means: weights move, entries are the means of what is theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hwopt.backends._torch_call import Tensor
from hwopt.ir import Graph
from hwopt.recover.dkm import Dkm
from hwopt.recover.palettes import Palette, one_step, palettes_of, weights_before
from hwopt.recover.torch.student import Student

LARGEST = 2**26  # weights x entries of a layer: above, its codes stay as they are


def assigned(weights: Tensor, book: Tensor, tau: Tensor) -> Tensor:
    """A = softmax(-|w - c| / tau): weights [books, n], entries [books, k] -> [books, n, k] (Cho et al. 2022, equation 2)."""
    return torch.softmax(-(weights.unsqueeze(2) - book.unsqueeze(1)).abs() / tau, 2)


def means(weights: Tensor, shares: Tensor, book: Tensor) -> Tensor:
    """c = A^T w / sum A (equation 3); an entry that nobody is near to stays where it is."""
    amount = shares.sum(1)
    return torch.where(amount > 1e-6, (shares * weights.unsqueeze(2)).sum(1) / amount.clamp_min(1e-6), book)


class PaletteStudent(Student):
    """The lookups of palettes are parameters of their own, [books, n]; in training A c is computed of them.

    Without gradients each weight has the nearest entry, as in the graph that is written. The graph that is computed lacks the
    lookups; entries are parameters that get no gradient and follow the weights.
    """

    def __init__(self, graph: Graph, teacher: Graph, recipe: Dkm) -> None:
        self.whole, self.recipe = graph, recipe
        most = [one for one in palettes_of(graph) if one.codes.size * graph.params[one.codebook].shape[-1] <= LARGEST]
        most = [one for one in most if one_step(graph, one)]
        self.palettes: dict[str, Palette] = {}
        edit = graph.edit()
        for one in most:
            book = graph.params[one.codebook].reshape(len(one.codes), -1)
            values = np.take_along_axis(book, one.codes, 1).reshape(graph.tensor(one.lookup.output).dims)
            name = edit.param(f"{one.lookup.name}_weights", values)
            edit.forward(one.lookup.output, name)
            self.palettes[name] = one
        super().__init__(edit.finish("dkm"), scales=recipe.scales, keep_zeros=recipe.keep_zeros)
        self._taus: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}
        for name, one in self.palettes.items():
            entries = torch.from_numpy(graph.params[one.codebook].astype(np.float32)) * self._unit(name)
            self._parameters[one.codebook] = torch.nn.Parameter(entries, requires_grad=False)
            rows = self._book(name)
            gap = (rows.amax(1) - rows.amin(1)) / max(rows.shape[1] - 1, 1)
            self._first_weights(name, weights_before(one, graph, teacher))
            self._taus[name] = (recipe.softness * gap).clamp_min(1e-12).reshape(-1, 1, 1)

    @torch.no_grad()
    def _first_weights(self, name: str, weights: np.ndarray | None) -> None:
        """The teacher's, where the nearest entry is the one that the graph has for them."""
        if weights is None:
            return
        given, codes = torch.from_numpy(np.array(weights, np.float32)), torch.from_numpy(self.palettes[name].codes)
        parameter = self.value_of(name)
        same = self._codes(name, given) == codes
        parameter.copy_(torch.where(same, given, parameter.reshape(codes.shape)).reshape(parameter.shape))

    def _unit(self, name: str) -> float:
        """Of integer entries, whose weights are trained in real numbers."""
        master = self.quantizers.masters.get(name)
        return master.unit if master and master.unit else 1.0

    def _book(self, name: str) -> Tensor:
        one = self.palettes[name]
        return self.value_of(one.codebook).reshape(len(one.codes), -1)

    def _start(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        values = super()._start(feeds)
        for name, one in self.palettes.items():
            weights = self.value_of(name).reshape(one.codes.shape)
            found = self._soft(name, weights) if torch.is_grad_enabled() else self._hard(name, weights)
            values[name] = found.reshape(self.graph.tensor(name).dims) / self._unit(name)
        return values

    def _soft(self, name: str, weights: Tensor) -> Tensor:
        """A c after some rounds of k-means, that go on from the entries of the step before."""
        book, tau = self._book(name).detach(), self._taus[name]
        for _ in range(self.recipe.rounds):
            book = means(weights, assigned(weights, book, tau), book)
        self._next[name] = book.detach()
        return torch.bmm(assigned(weights, book, tau), book.unsqueeze(2)).squeeze(2)

    def _hard(self, name: str, weights: Tensor) -> Tensor:
        return self._rounded(name).gather(1, self._codes(name, weights)) * self._unit(name)

    def _rounded(self, name: str) -> Tensor:
        """The entries as the graph holds them: integers where they are quantized."""
        steps = self._book(name) / self._unit(name)
        master = self.quantizers.masters.get(name)
        return torch.clamp(torch.round(steps), master.low, master.high) if master else steps

    def _codes(self, name: str, weights: Tensor) -> Tensor:
        return (weights.unsqueeze(2) - self._book(name).unsqueeze(1)).abs().argmin(2)

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        for name, book in self._next.items():
            stored = self.value_of(self.palettes[name].codebook)
            stored.copy_(book.reshape(stored.shape))

    @torch.no_grad()
    def arrays(self) -> dict[str, np.ndarray]:
        found = super().arrays()
        for name, one in self.palettes.items():
            weights = self.value_of(name).reshape(one.codes.shape)
            codes = self._codes(name, weights).numpy()
            found.pop(name, None)
            found[one.codebook] = self._rounded(name).numpy().reshape(self.whole.params[one.codebook].shape)
            found |= one.stored(self.whole, codes)
        return found
