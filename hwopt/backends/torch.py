"""Run a Graph as a differentiable torch module: gradients for sensitivity, scores of channels, and recovery.

    module = Module(graph)
    outputs = module({"image": images}, observe=["conv1_out"])   # tensors by name; .values keeps them
    outputs["logits"].sum().backward()
    trained = parameters_to_graph(graph, module, by="distill{epochs=1}")

Values are equal to ONNX Runtime's within float rounding. A family of operators has its rules in a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch

from hwopt.backends._torch_call import (
    FLOATS,
    INTEGERS,
    RANGES,
    WIDENED,
    Round,
    Tensor,
    held,
    is_carried,
    landed,
    rounded,
)  # fmt: skip
from hwopt.backends._torch_steps import CARRIES, RULES, Step, merged, steps
from hwopt.errors import DataError, PassError, UnsupportedError, did_you_mean
from hwopt.ir import Graph, Node, TensorType
from hwopt.samples import batch_of

HOLDS = frozenset(CARRIES | {"QuantizeLinear", "DequantizeLinear"})  # what takes types that torch only holds in a wider one
# Operands that say how, not what: nothing to train.
SETTINGS: Mapping[str, tuple[int, ...]] = {
    "Clip": (1, 2), "BatchNormalization": (3, 4), "Pad": (2,), "Resize": (1, 2, 3), "OneHot": (1, 2), "Range": (0, 1, 2),
    "Dropout": (1, 2),
}  # fmt: skip
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "PRelu")
Gates = Mapping[tuple[str, int], Tensor]


class Module(torch.nn.Module):
    """A Graph as a torch module; its parameters have the names that they have in the graph.

    Trained are float weights; with `scales` also those of quantizers (LSQ), with `integers` also integer weights and
    codebooks behind a DequantizeLinear: kept as floats, rounded straight through, written back rounded. Everything else is
    a buffer, the statistics of a BatchNormalization too. `precise` holds float32 as float64. `rounding` is what a quantizer
    does to numbers: `rounded` unless a check asks otherwise.
    Raises UnsupportedError that names every operator without a rule.
    """

    def __init__(
        self, graph: Graph, *, scales: bool = False, integers: bool = False, precise: bool = False, rounding: Round = rounded
    ) -> None:
        super().__init__()
        refuse_unsupported(graph)
        self.graph, self.precise = graph, precise
        self._options = {"scales": scales, "integers": integers, "precise": precise, "rounding": rounding}
        self.values: dict[str, Tensor] = {}  # outputs and observed values of the last run
        self.latent = _integer_weights(graph) if integers else frozenset()
        trained = self.latent | _float_weights(graph) | (_scales(graph) if scales else frozenset())
        for name, array in graph.params.items():
            kind = graph.tensor(name).dtype
            tensor = to_tensor(array, precise=precise) if kind != "string" else None
            if name in self.latent and tensor is not None:
                tensor = tensor.to(torch.float64 if precise else torch.float32)
            if name in trained and tensor is not None:
                self._parameters[name] = torch.nn.Parameter(tensor)  # names with dots: register_parameter refuses them
            else:
                self._buffers[name] = tensor
        self.rounding = rounding
        fewer = tuple(merged(graph)) if rounding is rounded else graph.nodes
        self._whole, self._steps = (tuple(steps(graph, nodes, precise, rounding)) for nodes in (graph.nodes, fewer))
        self._within = graph.producer.keys() - {name for node in fewer for name in node.outputs}

    def forward(self, feeds: Mapping[str, Any], *, observe: Iterable[str] = (), gates: Gates | None = None) -> dict[str, Tensor]:
        """Outputs, and the values to observe, by name. `feeds` are arrays or tensors.

        `gates` multiplies what one node reads, (node name, input index) -> tensor: its gradient is that of the edge.
        Float outputs have their declared type, quantized ones too unless they are observed (then floats with integer values).
        """
        values = self._start(feeds)
        wanted = (*self.graph.outputs, *observe)
        for name in observe:
            if name not in self.graph.producer and name not in values:
                raise PassError(f"no value {name!r} in {self.graph.name}", hint=did_you_mean(name, self.graph.producer))
        keep = set(wanted)
        for step in self._whole if gates or self._within & keep else self._steps:
            inputs = [self._read(values, step, index) for index in range(len(step.call.node.inputs))]
            inputs = _gated(step.call.node, inputs, gates) if gates else inputs
            results = step.rule(step.call, *inputs)
            results = results if isinstance(results, tuple) else (results,)
            values.update((name, one) for name, one in zip(step.call.node.outputs, results, strict=False) if name)
            for name in step.last:
                if name not in keep:
                    values.pop(name, None)
        kinds = {name: self.graph.tensor(name).dtype for name in wanted}
        for name in self.graph.outputs:
            if is_carried(values[name], kinds[name], precise=self.precise) and name not in observe:
                values[name] = landed(values[name], kinds[name], precise=self.precise)
        self.values = {name: values[name] for name in wanted}
        return dict(self.values)

    def put(self, name: str, tensor: Tensor) -> None:
        """Compute with this tensor in place of a parameter; gradients flow into whatever it was computed from."""
        self._parameters.pop(name, None)
        self._buffers[name] = tensor

    def stacks(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """Whether several samples in one run give what they give one run after the other: tried on these, [samples, ...].

        A graph with the static batch 1 can then be trained on larger batches; shapes that it states grow with the data. Tried in
        float64: there another order of summation turns no quantizer's rounding over.
        """
        count = len(next(iter(feeds.values()), ()))
        size = batch_of(self.graph)
        if count <= size:
            raise DataError(f"{count} samples for a batch of {size}", place=self.graph.name, hint="give at least two batches")
        run = Module(self.graph, precise=True)
        with torch.no_grad():
            alone = [run({n: a[i : i + size] for n, a in feeds.items()}) for i in range(0, count // size * size, size)]
            try:
                together = run({name: array[: count // size * size] for name, array in feeds.items()})
            except (RuntimeError, IndexError):  # shapes that do not fit
                return False
        return all(_alike(together[name], torch.cat([one[name] for one in alone])) for name in self.graph.outputs)

    def _start(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        missing = [name for name in self.graph.inputs if name not in feeds]
        if missing:
            raise DataError(f"lacks input {missing[0]!r}", place=self.graph.name, hint=f"it has {', '.join(feeds) or 'nothing'}")
        values = {name: one for name, one in self._buffers.items() if one is not None}
        for name, one in self._parameters.items():
            if one is not None:
                values[name] = self._grid(name, one) if name in self.latent else one
        for name in self.graph.inputs:
            fed = feeds[name]
            tensor = fed if isinstance(fed, Tensor) else to_tensor(np.asarray(fed), precise=self.precise)
            values[name] = tensor.double() if self.precise and tensor.is_floating_point() else tensor
        return values

    def _grid(self, name: str, latent: Tensor) -> Tensor:
        low, high = RANGES[self.graph.tensor(name).dtype]
        return torch.clamp(self.rounding(latent), low, high)

    def _read(self, values: Mapping[str, Tensor], step: Step, index: int) -> Tensor | None:
        name = step.call.node.inputs[index]
        if not name:
            return None
        value, kind = values[name], step.call.reads[index]
        if step.carries or not is_carried(value, kind, precise=self.precise):
            return value
        return landed(value, kind, precise=self.precise)

    def __deepcopy__(self, _: Any) -> Module:
        """A module of its own with the same values, for teachers and moving averages."""
        copy = Module(self.graph, **self._options)  # type: ignore[arg-type]
        copy.load_state_dict(self.state_dict())
        for name, parameter in copy.named_parameters():
            parameter.requires_grad_(self._parameters[name].requires_grad)  # type: ignore[union-attr]
        return copy.train(self.training)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ARG002
        """As torch's, for names with dots."""
        own = {name: one for name, one in {**self._parameters, **self._buffers}.items() if one is not None}
        odd = [name for name in state_dict if name not in own] + [name for name in own if name not in state_dict]
        if strict and odd:
            raise DataError(f"state does not fit the graph: {odd[0]}", place=self.graph.name)
        with torch.no_grad():
            for name, tensor in state_dict.items():
                mine = own.get(name)
                if mine is not None:
                    mine.copy_(tensor)
        return torch.nn.modules.module._IncompatibleKeys([], [])


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal up to the rounding of another order of summation."""
    scale = float(other.double().abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and bool((one.double() - other.double()).abs().max() <= 1e-4 * max(scale, 1e-6))


def _gated(node: Node, inputs: list[Tensor | None], gates: Gates) -> list[Tensor | None]:
    found = [gates.get((node.name, index)) for index in range(len(inputs))]
    return [one if gate is None or one is None else one * gate for one, gate in zip(inputs, found, strict=True)]


def unsupported(graph: Graph) -> list[tuple[Node, str]]:
    """Every node that has no rule here, with the reason. Nothing is run."""
    return [(node, reason) for node in graph.nodes if (reason := _reason(graph, node))]


def refuse_unsupported(graph: Graph) -> None:
    """Raise one UnsupportedError that names all operators of `unsupported`, with their nodes."""
    found: dict[str, list[str]] = {}
    for node, reason in unsupported(graph):
        found.setdefault(reason, []).append(node.name)
    if found:
        listed = "; ".join(f"{reason}: {', '.join(names[:4])}{' ...' * (len(names) > 4)}" for reason, names in found.items())
        raise UnsupportedError(f"no gradients for {listed}", place=graph.name, hint="use what needs no gradients")


def _reason(graph: Graph, node: Node) -> str:
    if node.domain not in ("", "ai.onnx") or node.op not in RULES:
        return f"{node.domain}.{node.op}" if node.domain not in ("", "ai.onnx") else node.op
    if node.op == "MaxPool" and len(node.outputs) > 1 and node.outputs[1]:
        return "MaxPool with indices"
    if node.op == "Dropout" and len(node.inputs) > 2 and node.inputs[2] and not _is_false(graph, node.inputs[2]):
        return "Dropout in training"
    if graph.opsets.get("", 99) < 13:
        return f"{node.op} before opset 13"
    for value in (*node.inputs, *node.outputs):
        kind = graph.types.get(value)
        if not value:
            continue
        if not isinstance(kind, TensorType) or kind.dtype not in {**FLOATS, **INTEGERS, **WIDENED}:
            return f"{node.op} on {kind}"
        if kind.dtype in WIDENED and node.op not in HOLDS:
            return f"{node.op} on {kind.dtype}"
    return ""


def _is_false(graph: Graph, value: str) -> bool:
    array = graph.constant(value)
    return array is not None and not array.any()


def _float_weights(graph: Graph) -> frozenset[str]:
    """Float parameters that are no settings, scales or numbers of a formula."""
    fixed = {node.inputs[i] for node in graph.nodes for i in SETTINGS.get(node.op, ()) if i < len(node.inputs)} | _scales(graph)
    weights = {value for node in graph.nodes if node.op in WEIGHTED for value in node.inputs[1:]}
    floats = {name for name in graph.params if graph.tensor(name).dtype in FLOATS}
    return frozenset(name for name in floats - fixed if graph.params[name].size > 1 or name in weights)


def _scales(graph: Graph) -> frozenset[str]:
    quantizers = (node for node in graph.nodes if node.op in ("QuantizeLinear", "DequantizeLinear"))
    return frozenset(node.inputs[1] for node in quantizers if node.inputs[1] in graph.params)


def _integer_weights(graph: Graph) -> frozenset[str]:
    """Integer parameters that reach a DequantizeLinear by moves alone: weights, and the codebooks of palettes."""
    found = set()
    for node in graph.nodes:
        value = node.inputs[0] if node.op == "DequantizeLinear" else ""
        while value in graph.producer and graph.producer[value].op in CARRIES - {"Cast", "CastLike", "Where"}:
            value = graph.producer[value].inputs[0]
        if value in graph.params and graph.tensor(value).dtype in RANGES:
            found.add(value)
    return frozenset(found)


def parameters_to_graph(graph: Graph, module: Module, by: str = "train") -> Graph:
    """The graph with the module's trained values; whoever reads a changed one is stamped with `by`.

    Integer weights are rounded into their range. Raises PassError for values that are not finite or scales that are not positive.
    """
    edit, touched = graph.edit(), set()
    for name, tensor in module.named_parameters():
        array, kind = to_array(tensor.detach()), graph.tensor(name).dtype
        if name in module.latent:
            array = np.clip(np.rint(array), *RANGES[kind])
        array = array.astype(graph.params[name].dtype)
        if not np.isfinite(array.astype(np.float64)).all():
            raise PassError(f"{name} is not finite after training", place=by, hint="lower the learning rate")
        if name in _scales(graph) and not (array > 0).all():
            raise PassError(f"the scale {name} is not positive after training", place=by, hint="lower the learning rate")
        if not np.array_equal(array, graph.params[name]):
            edit.set_param(name, array)
            touched.add(name)
    for node in graph.nodes:
        if touched.intersection(node.reads):
            edit.replace(node)
    return edit.finish(by)


def to_tensor(array: np.ndarray, *, precise: bool = False) -> Tensor:
    """A tensor of its own with the array's values, in the type that they are held in."""
    kind = "bfloat16" if array.dtype == ml_dtypes.bfloat16 else np.dtype(array.dtype).name
    wanted = held(kind, precise=precise)
    if kind in INTEGERS or (kind in FLOATS and kind != "bfloat16"):
        return torch.tensor(np.array(array)).to(wanted)
    return torch.tensor(np.array(array, np.float32 if kind == "bfloat16" else np.int64)).to(wanted)


def to_array(tensor: Tensor) -> np.ndarray:
    """The values as numpy; bfloat16 as ml_dtypes' type."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()


__all__ = ["CARRIES", "RULES", "Module", "parameters_to_graph", "refuse_unsupported", "to_array", "to_tensor", "unsupported"]
