"""What a small change of any value does to the outputs: gradients by one backward pass per batch, streamed.

The currency is the one of hwopt.evaluate.divergence: the mean KL of the softmax for classifiers, squared error over signal power
for everything else. Near the original both are quadratic, 1/2 d^T F d in the change d of the outputs. A vector z with
E[z z^T] = F makes one backward pass do: 1/2 E[(z^T J dy)^2] is the expected error of a change dy anywhere, J being the
derivative of the outputs.
For logits with probabilities p, F = sum_c p_c (e_c - p)(e_c - p)^T (the Fisher information of the model's own predictions), and
z = sum_c s_c sqrt(p_c) (e_c - p) with random signs s has it; a label drawn from p has it too, but for a model that is sure it is
nearly always zero. With labels z is the gradient of their cross entropy (the empirical Fisher).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwopt.backends.ort import Session
from hwopt.errors import DataError, ToolchainError
from hwopt.evaluate import is_classifier
from hwopt.ir import Graph
from hwopt.samples import Samples, batch_of

EXACT_CLASSES = 16  # up to this many classes `expected` takes one backward pass for each instead of random signs
Arrays = Mapping[str, np.ndarray]
Tensors = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Currency:
    """How the error of each floating-point output counts: as logits, as probabilities, or squared over `power` (per sample)."""

    kinds: Mapping[str, str]
    power: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Sweep:
    """One batch and one direction z: values and the gradients of z^T outputs with respect to them, in each value's shape."""

    values: Arrays
    gradients: Arrays
    weight: float  # of this direction: the sum of weight z z^T over those of a batch is F, or estimates it
    batch: int


def missing(graph: Graph) -> str:
    """Why there are no gradients for this graph; empty if there are."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    from hwopt.backends.torch import unsupported

    ops = dict.fromkeys(reason for _, reason in unsupported(graph))
    if ops:
        return f"no gradients for {', '.join(ops)}"
    floats = [name for name in graph.outputs if "float" in graph.tensor(name).dtype]
    return "" if floats else "no output is a floating-point number"


def require_gradients(graph: Graph, what: str) -> None:
    """Raise ToolchainError with the next step if `missing` has a reason."""
    reason = missing(graph)
    if reason:
        torch = "not installed" in reason
        hint = "pip install 'hwopt[torch]'" if torch else "choose one that needs no gradients"
        raise ToolchainError(f"needs gradients: {reason}", place=what, hint=hint)


def currency_of(graph: Graph, samples: Samples) -> Currency:
    """Looked up in the outputs over all samples. Raises DataError where there are none."""
    session = Session(graph)
    runs = [session.run(feeds) for feeds in samples.feeds(graph)]
    if not runs:
        raise DataError("no samples", place=samples.source)
    kinds, power = {}, {}
    for name in graph.outputs:
        whole = np.concatenate([np.atleast_1d(run[name]) for run in runs])
        if np.issubdtype(whole.dtype, np.floating):
            kinds[name] = output_kind(whole)
            rows = len(runs) * batch_of(graph)
            power[name] = max(float((whole.astype(np.float64) ** 2).sum()) / rows, 1e-30)
    return Currency(kinds, power)


def output_kind(output: np.ndarray) -> str:
    """What an output over several samples holds: logits, probabilities, or values of any other kind."""
    if not is_classifier(output):
        return "values"
    return "probabilities" if output.min() >= 0 and np.allclose(output.sum(1), 1, atol=1e-3) else "logits"


def sweeps(
    graph: Graph,
    samples: Samples,
    values: Iterable[str],
    *,
    currency: Currency | None = None,
    draws: int = 1,
    expected: bool = False,
    seed: int = 0,
    gates: Mapping[tuple[str, int], tuple[int, ...]] | None = None,
    apart: bool = False,
) -> Iterator[Sweep]:
    """Every batch, of `values` (parameters too) with `draws` directions each: one with labels, and with `expected` one for each
    class where there are few.

    `gates` are shapes of ones that multiply what a node reads at an input; they come among the values (see gate_name). Each
    sample's gradient is in its row of the leading axis, as long as samples do not look at each other. `apart`: one direction for
    each sample of a batch, so that the gradients of parameters are its alone.
    """
    import torch

    from hwopt.backends.torch import Module

    module, random = Module(graph), np.random.default_rng(seed)
    known = {*graph.producer, *graph.inputs, *(name for name, _ in module.named_parameters())}
    wanted = [value for value in dict.fromkeys(values) if value in known]
    currency = currency or currency_of(graph, samples)
    for start, feeds in _batches(graph, samples):
        rows = len(next(iter(feeds.values()))) if feeds else 1
        ones = {key: torch.ones(shape, requires_grad=True) for key, shape in (gates or {}).items()}
        outputs, sought = _forward(module, feeds, wanted, ones)
        labels = None if samples.labels is None else samples.labels[start : start + rows]
        directions = list(_directions(outputs, currency, labels, draws, expected, random))
        yield from _backward(outputs, sought, list(_each(directions, rows)) if apart else directions, rows)


def _forward(module: Any, feeds: Arrays, wanted: list[str], ones: Mapping[tuple[str, int], Any]) -> tuple[Tensors, Tensors]:
    """The outputs, and what is looked at: values, inputs, parameters and gates by name."""
    import torch

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    for name in wanted:
        if name in tensors and tensors[name].is_floating_point():
            tensors[name].requires_grad_()
    outputs = module(tensors, observe=[name for name in wanted if name in module.graph.producer], gates=ones)
    found = {**tensors, **dict(module.named_parameters()), **outputs}
    return outputs, {name: found[name] for name in wanted} | {gate_name(key): one for key, one in ones.items()}


def _backward(outputs: Tensors, sought: Tensors, directions: list[tuple[Tensors, float]], rows: int) -> Iterator[Sweep]:
    """One backward pass for each direction."""
    import torch

    from hwopt.backends.torch import to_array

    values = {name: to_array(one) for name, one in sought.items()}
    active = {name: one for name, one in sought.items() if one.requires_grad}
    for number, (direction, weight) in enumerate(directions):
        targets, along = [outputs[name] for name in direction], list(direction.values())
        more = number + 1 < len(directions)
        found = torch.autograd.grad(targets, list(active.values()), along, retain_graph=more, allow_unused=True) if active else ()
        gradients = {
            name: np.zeros(values[name].shape, np.float32) if one is None else to_array(one)
            for name, one in zip(active, found, strict=True)
        }
        yield Sweep(values, gradients, weight, rows)


def gate_name(key: tuple[str, int]) -> str:
    """How the gate of a node's input is called in a Sweep."""
    return f"{key[0]}#{key[1]}"


def _batches(graph: Graph, samples: Samples) -> Iterator[tuple[int, Arrays]]:
    return ((index * batch_of(graph), feeds) for index, feeds in enumerate(samples.feeds(graph)))


def _directions(
    outputs: Mapping[str, Any],
    currency: Currency,
    labels: np.ndarray | None,
    draws: int,
    expected: bool,
    random: np.random.Generator,
) -> Iterator[tuple[Tensors, float]]:
    """Vectors z by output with their weights: the sum of weight * z z^T is F, or estimates it."""
    first = next(iter(currency.kinds))
    if labels is not None and currency.kinds[first] != "values":
        yield {first: _label_direction(outputs[first].detach(), currency.kinds[first], labels)}, 1.0
        return
    classes = outputs[first].shape[-1]
    if expected and len(currency.kinds) == 1 and currency.kinds[first] != "values" and classes <= EXACT_CLASSES:
        for one in range(classes):
            signs = np.zeros(tuple(outputs[first].shape), np.float32)
            signs[:, one] = 1
            yield {first: _root(outputs[first].detach(), currency, first, signs)}, 1.0
        return
    for _ in range(draws):
        yield (
            {
                name: _root(outputs[name].detach(), currency, name, random.choice([-1.0, 1.0], tuple(outputs[name].shape)))
                for name in currency.kinds
            },
            1.0 / draws,
        )


def _each(directions: Iterable[tuple[Tensors, float]], rows: int) -> Iterator[tuple[Tensors, float]]:
    """Every direction in parts: those of each row of the outputs; whole where outputs have no such rows."""
    import torch

    for direction, weight in directions:
        if rows == 1 or any(not one.ndim or len(one) != rows for one in direction.values()):
            yield direction, weight
            continue
        for row in range(rows):
            mask = torch.arange(rows) == row
            yield {name: one * mask.reshape(-1, *(1,) * (one.ndim - 1)) for name, one in direction.items()}, weight


def _root(output: Any, currency: Currency, name: str, signs: np.ndarray) -> Any:
    """F^(1/2) signs: E[z z^T] = F for random signs, and the sum over unit vectors is F too."""
    import torch

    along = torch.from_numpy(np.asarray(signs, np.float32)).to(output.dtype)
    if currency.kinds[name] == "values":
        return along * (2.0 / currency.power[name]) ** 0.5
    if currency.kinds[name] == "probabilities":
        return along / output.clamp(min=1e-12).sqrt()
    chances = torch.softmax(output, -1)
    root = along * chances.sqrt()
    return root - chances * root.sum(-1, keepdim=True)


def _label_direction(output: Any, kind: str, labels: np.ndarray) -> Any:
    """The gradient of the cross entropy with respect to the output."""
    import torch

    at = torch.from_numpy(np.asarray(labels, np.int64)).reshape(-1, 1)
    hot = torch.zeros_like(output).scatter(1, at, 1.0)
    return -hot / output.clamp(min=1e-12) if kind == "probabilities" else torch.softmax(output, -1) - hot
