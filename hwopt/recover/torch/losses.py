"""What is minimized: distance from the teacher's outputs and features, from the labels, or the user's own number."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from hwopt.analysis.fisher import output_kind
from hwopt.errors import DataError, UsageError
from hwopt.ir import Graph
from hwopt.recover.recipe import Recipe

Tensor = torch.Tensor
Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensors, "Tensor | None"], Tensor]
WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")
MOST_FEATURES = 4
OWN_LOSS = "leave labels out, or give a loss of your own, which takes any"


@dataclass(frozen=True, eq=False)
class Distance:
    """A recipe's loss. `kinds` says for each floating-point output whether it holds logits, probabilities or values."""

    recipe: Recipe
    kinds: Mapping[str, str]
    features: tuple[str, ...] = ()

    def __call__(self, found: Tensors, wanted: Tensors, labels: Tensor | None) -> Tensor:
        recipe, parts = self.recipe, []
        logits, hard = recipe.logits, recipe.hard
        if hard and labels is None and not logits:
            logits, hard = hard, 0.0  # the teacher's answers in place of labels
        if logits:
            parts += [logits * self._outputs(name, found[name], wanted[name]) for name in self.kinds]
        if recipe.features:
            parts += [recipe.features / len(self.features) * _relative(found[n], wanted[n]) for n in self.features]
        if hard and labels is not None:
            parts.append(hard * _cross_entropy(found[next(iter(self.kinds))], labels, self.kinds[next(iter(self.kinds))]))
        return torch.stack([part.reshape(()) for part in parts]).sum()

    def _outputs(self, name: str, found: Tensor, wanted: Tensor) -> Tensor:
        """T^2 KL(softmax(wanted / T) || softmax(found / T)) for classes (Hinton et al. 2015), else relative squared error."""
        kind, temperature = self.kinds[name], self.recipe.temperature
        if kind == "values":
            return _relative(found, wanted)
        mine, target = (functional.log_softmax(_logits(one, kind) / temperature, 1) for one in (found, wanted))
        return functional.kl_div(mine, target, reduction="batchmean", log_target=True) * temperature**2


def _logits(output: Tensor, kind: str) -> Tensor:
    return output.clamp_min(1e-9).log() if kind == "probabilities" else output


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over the teacher's power."""
    return functional.mse_loss(found, wanted) / wanted.square().mean().clamp_min(1e-12)


def _cross_entropy(output: Tensor, labels: Tensor, kind: str) -> Tensor:
    axis = _class_axis(output, labels)
    if axis is None or (output.ndim == 2 and kind == "values"):
        hint = "give class indices for all of the output's places, [samples] or [samples, ...], or a loss of your own"
        raise DataError(f"no cross entropy of a {list(output.shape)} output with labels {list(labels.shape)}", hint=hint)
    check_classes(labels)
    if int(labels.max()) >= output.shape[axis]:
        raise DataError(f"label {int(labels.max())} for a model with {output.shape[axis]} classes", place="training data")
    return functional.cross_entropy(_logits(output, kind).movedim(axis, 1), labels.long())  # labels of -100 do not count


def check_classes(labels: Tensor) -> None:
    """Raise DataError for numbers that name no classes."""
    if labels.is_floating_point() and bool((labels != labels.round()).any()):
        raise DataError(f"labels such as {float(labels.reshape(-1)[0]):g} are no classes", place="training data", hint=OWN_LOSS)


def _class_axis(output: Tensor, labels: Tensor) -> int | None:
    """The axis of an output that labels of its other axes choose from: the last (tokens), or the second (pixels)."""
    shape = list(output.shape)
    return next((axis for axis in (output.ndim - 1, 1) if shape[:axis] + shape[axis + 1 :] == list(labels.shape)), None)


def kinds_of(outputs: Mapping[str, Any], graph: Graph) -> dict[str, str]:
    """What the teacher's floating-point outputs are, looked up in some of them. Raises DataError where there is none."""
    kinds = {name: output_kind(outputs[name]) for name in graph.outputs if "float" in graph.tensor(name).dtype}
    if not kinds:
        raise DataError("no output is a floating-point number", place=graph.name, hint="give a loss of your own")
    return kinds


def shared_features(graph: Graph, teacher: Graph) -> tuple[str, ...]:
    """Values that both graphs compute in layers with weights, under the same name and in the same shape; evenly chosen.

    Raises UsageError where there is none: pruned layers have other shapes.
    """
    both = [node.output for node in teacher.nodes if node.op in WEIGHTED and node.output in graph.producer]
    common = [name for name in both if teacher.types[name] == graph.types[name] and name not in teacher.outputs]
    if not common:
        hint = "leave features out of the recipe"
        raise UsageError("no intermediate value has the same name and shape in both models", place=graph.name, hint=hint)
    count = min(MOST_FEATURES, len(common))
    return tuple(common[(index + 1) * len(common) // count - 1] for index in range(count))


def user_loss(text: str) -> Loss:
    """`module:function`; raises UsageError if there is no such function."""
    module, _, name = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import the loss {text!r} ({error})", hint="write loss=module:function") from error
    if not callable(found):
        raise UsageError(f"{text!r} is no function", hint="it is called with loss(outputs, teacher's outputs, labels)")
    return found


def loss_name(loss: Callable[..., Any]) -> str:
    """`module:function` of the user's loss; what has no name of its own, as a torch module, is called by its class."""
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}:{named.__qualname__}"


def checked_number(value: Any) -> Tensor:
    """The user's loss as one finite number with a gradient; raises DataError otherwise."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise DataError("returned no torch number with a gradient", place="loss", hint="compute it from the outputs")
    return value.reshape(())
