"""Adversarial inputs: the fast gradient sign (Goodfellow et al., arXiv:1412.6572) and projected gradient descent (Madry et al.,
arXiv:1706.06083), within epsilon of each sample in the largest norm.

Gradients come from hwopt.backends.torch, which passes rounding straight through (of a quantized model that is BPDA, Athalye et
al., arXiv:1802.00420). The few lines below stand in for an attack library: torchattacks brings torchvision and pins requests to
2.25, foolbox brings GitPython; the Adversarial Robustness Toolbox computes the same (fgsm equal to the bit on the demo model) but
brings scikit-learn, takes seconds to import, and its attacks do not end on the whole numbers that a library of bytes takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwopt.errors import DataError, UsageError, did_you_mean
from hwopt.evaluation.pixels import pixels_of
from hwopt.ir import Graph
from hwopt.samples import Samples, batch_of

ATTACKS = ("fgsm", "pgd")
STEPS = 10
STEP_SHARE = 2.5  # of epsilon over the number of steps: every point of the box can be reached (Madry et al.)
MOST, ELEMENTS = 64, 1 << 20  # samples at once, and numbers of their inputs: what a backward pass keeps is a multiple


@dataclass(frozen=True)
class Box:
    """What an attack may change: one input by `epsilon` (in its own units), within `low` and `high`, `whole` numbers or any."""

    name: str
    epsilon: float
    low: float
    high: float
    whole: bool


def parse_attacks(text: str) -> tuple[str, ...]:
    """Names by comma. Raises UsageError for unknown ones."""
    found = tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    for name in found:
        if name not in ATTACKS:
            raise UsageError(f"unknown attack {name!r}", place="--attack", hint=did_you_mean(name, ATTACKS))
    return found


def box_of(graph: Graph, samples: Samples, epsilon: float) -> Box:
    """The only float input, or the pixels; epsilon is a share of their range: white for pictures, else what the data span.

    Raises DataError for models that take integers or several inputs.
    """
    try:
        pixels = pixels_of(graph, samples)
        return Box(pixels.name, max(epsilon * pixels.white, 1.0 if pixels.whole else 0.0), 0.0, pixels.white, pixels.whole)
    except DataError as error:
        floats = [name for name in graph.inputs if "float" in graph.tensor(name).dtype]
        if len(floats) != 1:
            reason = f"{len(floats)} inputs take floats: there is no one thing to change by a little"
            raise DataError(reason, place=graph.name) from error
        array = samples.arrays[floats[0]]
        low, high = float(array.min()), float(array.max())
        return Box(floats[0], epsilon * (high - low), low, high, False)


class Attacker:
    """One graph under attack; the labels are what it shall no longer answer.

    Raises UnsupportedError where the graph has operators without gradients.
    """

    def __init__(self, graph: Graph, samples: Samples, box: Box) -> None:
        from hwopt.backends.torch import Module

        self.graph, self.samples, self.box = graph, samples, box
        self.classes = np.asarray(samples.labels, np.int64)
        self.module = Module(graph)
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self.batch = self._batch()

    def _batch(self) -> int:
        """As many samples at once as the graph takes."""
        size = batch_of(self.graph)
        some = {name: array[: 2 * size] for name, array in self.samples.arrays.items()}
        if len(self.samples) < 2 * size or not self.module.stacks(some):
            return size
        numbers = self.samples.arrays[self.box.name][0].size
        return size * max(min(MOST, ELEMENTS // numbers) // size, 1)

    def attacked(self, attack: str, steps: int, seed: int, watch: Callable[[int, int], None]) -> np.ndarray:
        """The input after the attack, for all samples that fill whole batches of the graph."""
        import torch

        size, count = batch_of(self.graph), len(self.classes)
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for start in range(0, count // size * size, self.batch):
            rows = slice(start, min(start + self.batch, count // size * size))
            parts.append(self._one(attack, steps, rows, generator))
            watch(rows.stop, count)
        return np.concatenate(parts)

    def _one(self, attack: str, steps: int, rows: slice, generator: Any) -> np.ndarray:
        import torch

        box, clean = self.box, torch.from_numpy(self.samples.arrays[self.box.name][rows].astype(np.float32))
        changed, stride = clean.clone(), box.epsilon
        if attack == "pgd":
            noise = torch.rand(clean.shape, generator=generator) * 2 - 1
            changed, stride = torch.clamp(clean + noise * box.epsilon, box.low, box.high), STEP_SHARE * box.epsilon / steps
        for _ in range(steps if attack == "pgd" else 1):
            changed = changed + stride * self._gradient(changed, rows).sign()
            changed = torch.clamp(torch.clamp(changed, clean - box.epsilon, clean + box.epsilon), box.low, box.high)
        return self._landed(changed.numpy(), clean.numpy(), self.samples.arrays[box.name].dtype)

    def _landed(self, changed: np.ndarray, clean: np.ndarray, kind: np.dtype) -> np.ndarray:
        """In the input's own type: whole numbers are rounded, and stay within epsilon."""
        if self.box.whole:
            most = np.floor(self.box.epsilon + 1e-3)
            changed = np.clip(np.rint(changed), clean - most, clean + most)
        return changed.astype(kind)

    def _gradient(self, values: Any, rows: slice) -> Any:
        """Of the cross entropy of the classes."""
        import torch

        values = values.detach().requires_grad_(True)
        feeds = {name: array[rows] for name, array in self.samples.arrays.items()} | {self.box.name: values}
        found = self.module(feeds)[self.graph.outputs[0]]
        logits = found.reshape(found.shape[0], -1).float()
        targets = torch.from_numpy(self.classes[rows])
        sums = logits.detach().sum(1)
        if bool((logits.detach() >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            loss = torch.nn.functional.nll_loss(torch.log(logits.clamp_min(1e-12)), targets, reduction="sum")
        else:
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        if not loss.requires_grad:
            raise DataError(f"no gradient reaches {self.box.name}", place=self.graph.name)
        return torch.autograd.grad(loss, values)[0]


def attack_order(attacks: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(attack, the model that it is made on): what transfers from the float model, and white-box on the compressed one."""
    return ((attack, side) for attack in attacks for side in ("float", "compressed"))
