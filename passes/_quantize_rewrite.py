"""Write the quantized form: QuantizeLinear behind kernels, DequantizeLinear in front of readers, integer weights and biases."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hwopt.analysis.qdq import Quantization
from hwopt.analysis.ranges import Grid
from hwopt.ir import Edit, Graph, Node, part, scalar
from passes._quantize_layers import Integers, Layer, integers_of
from passes._quantize_places import DATA, LEFT, RIGHT, Key, Places, over_image


def rewrite(
    places: Places,
    layers: Mapping[str, Layer],
    grids: Mapping[Key, Grid],
    means: Mapping[str, np.ndarray],
    *,
    reduced: Container[str],
    bits: Mapping[str, int],
) -> Edit:
    """All changes as one Edit; `grids` holds the grid of every group of points, `means` those of layers' input channels,
    `bits` how wide each layer's weights become, but for 8 bits of the `reduced` ones, which become 7.
    """
    form = _Form(places, grids, places.graph.edit())
    for key in places.points:
        form.quantize(key)
    order = {node.name: index for index, node in enumerate(places.graph.nodes)}
    moves = sorted(((node, role) for (_, role), node in places.moved.items()), key=lambda move: order[move[0].name])
    form.keep(reversed(moves))
    for node, role in moves:
        form.move(node, role)
    for (name, index), role in places.reads.items():
        node = places.graph.node[name]
        form.rewire(node, index, form.dequantized((node.inputs[index], role)))
    for name, layer in layers.items():
        if layer.weight is not None:
            key = layer.node.inputs[0], DATA
            mean = means.get(name)
            form.weigh(layer, integers_of(layer, form.scale_of(key), mean, reduce_range=name in reduced, bits=bits[name]))
    return form.finish(name for name, layer in layers.items() if layer.node.op == "Gemm")


@dataclass
class _Form:
    """The names that quantized values have in the new graph."""

    places: Places
    grids: Mapping[Key, Grid]
    edit: Edit
    eight: dict[Key, str] = field(default_factory=dict)  # the 8-bit value
    copies: dict[Key, str] = field(default_factory=dict)  # the same dequantized
    grid_names: dict[Key, tuple[str, str]] = field(default_factory=dict)  # scale and zero point of a group
    inputs: dict[str, list[str]] = field(default_factory=dict)  # of rewired nodes
    kept: set[Key] = field(default_factory=set)  # moved nodes, with their role, whose float form is still read
    integer_nodes: set[str] = field(default_factory=set)  # moved in place: they read integers
    weights: dict[tuple[str, bytes], str] = field(default_factory=dict)  # dequantized weights, by origin and scale

    @property
    def graph(self) -> Graph:
        return self.places.graph

    @cached_property
    def known(self) -> Mapping[Key, tuple[Node, Quantization]]:
        """Group -> a node that fixes its grid already."""
        return {self.places.group(key): found for key, found in self.places.known.items()}

    def scale_of(self, key: Key) -> float:
        """The scale of a quantized value."""
        group = self.places.group(key)
        return float(self.known[group][1].scale) if group in self.known else self.grids[group].scale

    def grid(self, key: Key) -> tuple[str, str]:
        """Names of scale and zero point, added where the graph has none for this group yet."""
        group = self.places.group(key)
        if group not in self.grid_names:
            self.grid_names[group] = self._grid_names(key[0], group)
        return self.grid_names[group]

    def _grid_names(self, hint: str, group: Key) -> tuple[str, str]:
        if group in self.known:
            node, found = self.known[group]
            if len(node.inputs) > 2 and node.inputs[2]:
                return node.inputs[1], node.inputs[2]
            grid = Grid(float(found.scale), int(found.zero_point), found.dtype)
        else:
            grid = self.grids[group]
        scale = self.edit.param(f"{hint}_scale", np.array(grid.scale, np.float32))
        return scale, self.edit.param(f"{hint}_zero_point", np.array(grid.zero_point, grid.dtype))

    def quantize(self, key: Key) -> None:
        """Q behind the kernel; a Relu or Clip that the grid's own limits repeat is left out: Q(relu(x)) = Q(x)."""
        source = self._mean(key) or self._clamped(key)
        name = self.edit.fresh(f"{key[0]}_quantized")
        name = self.edit.emit("QuantizeLinear", [source, *self.grid(key)], name=f"{key[0]}_quantize", outputs=[name])
        node = self.graph.producer.get(key[0])
        flat = node is not None and node.op == "ReduceMean" and source != key[0] and not node.attr("keepdims", 1)
        self.eight[key] = self.edit.emit("Flatten", [name], name=part(node, "flat")) if flat and node is not None else name

    def _mean(self, key: Key) -> str:
        """A mean over the image becomes a GlobalAveragePool, which integer kernels know; its flat form is a view of that."""
        node = self.graph.producer.get(key[0])
        if node is None or node.op != "ReduceMean" or not over_image(self.graph, node):
            return ""
        if (node.name, 0) not in self.places.reads or key[0] in self.graph.outputs:
            return ""
        output = self.edit.fresh(f"{key[0]}_pooled")
        self.inputs[node.name] = [node.inputs[0]]
        self.edit.replace(node, op="GlobalAveragePool", inputs=node.inputs[:1], outputs=(output,), attrs={})
        return output

    def _clamped(self, key: Key) -> str:
        value, role = key
        node = self.graph.producer.get(value)
        if node is None or node.op not in ("Relu", "Clip") or value in self.graph.outputs:
            return value
        feeder = self.graph.producer.get(node.inputs[0])
        apart = any(
            self.places.reads.get(edge) != role and (edge[0], role) not in self.places.moved for edge in self._edges(value)
        )
        if apart or feeder is None or (node.name, 0) in self.places.reads or self.graph.sole_user(node.inputs[0]) is None:
            return value
        return node.inputs[0] if clamps(self.grids[self.places.group(key)], *bounds_of(self.graph, node)) else value

    def dequantized(self, key: Key) -> str:
        """The float copy of an 8-bit value: one for all who read it."""
        if key not in self.copies:
            node, _ = self.places.known.get(key, (None, None))
            if node is not None and node.op == "DequantizeLinear":
                self.copies[key] = key[0]
            else:
                integer, names = self.integer(key), self.grid(key)
                self.copies[key] = self._dequantize(key[0], integer, names)
        return self.copies[key]

    def integer(self, key: Key) -> str:
        """The 8-bit value of a key."""
        if key not in self.eight:
            node, _ = self.places.known[key]
            self.eight[key] = node.output if node.op == "QuantizeLinear" else node.inputs[0]
        return self.eight[key]

    def _dequantize(self, value: str, integer: str, names: Iterable[str], axis: int | None = None) -> str:
        output = self.edit.fresh(f"{value}_dequantized")
        attrs = {} if axis is None else {"axis": axis}
        return self.edit.emit("DequantizeLinear", [integer, *names], name=f"{value}_dequantize", outputs=[output], attrs=attrs)

    def keep(self, moves: Iterable[tuple[Node, str]]) -> None:
        """Note which moved nodes stay in float as well, readers first: their own float inputs are then read too."""
        for node, role in moves:
            if not self._computed(node, role) and self._read_in_float(node, role):
                self.kept.add((node.name, role))

    def _computed(self, node: Node, role: str) -> bool:
        return role == DATA and node.output in self.places.integer

    def move(self, node: Node, role: str) -> None:
        """The same operator on integers, in place of the float one unless somebody still reads that."""
        inputs = [self.integer((v, role)) if i == 0 or node.op == "Concat" else v for i, v in enumerate(node.inputs)]
        if node.op == "Pad" and node.attr("mode", "constant") in ("constant", b"constant"):
            inputs[2:3] = [self.grid((node.output, role))[1]]
        outputs = [self.edit.fresh(f"{value}_quantized") if value else "" for value in node.outputs]
        self.eight.update(((value, role), name) for value, name in zip(node.outputs, outputs, strict=True))
        computed = self._computed(node, role)
        if (node.name, role) not in self.kept:
            self.edit.replace(node, inputs=tuple(inputs), outputs=tuple(outputs))
            self.integer_nodes.add(node.name)
        else:
            self.edit.emit(node.op, inputs, attrs=node.attrs, name=part(node, f"{role}8"), outputs=outputs, like=node)
        for value in node.outputs if computed else ():
            if value in self.graph.outputs:
                self.edit.forward(value, self.dequantized((value, role)))

    def _read_in_float(self, node: Node, role: str) -> bool:
        """True if somebody reads the node's result as it was, or in another role."""
        if any((node.name, other) in self.places.moved for other in (DATA, LEFT, RIGHT) if other != role):
            return True
        for value in node.outputs:
            edges = self._edges(value)
            if value in self.graph.outputs:
                return True
            floating = [edge for edge in edges if edge not in self.places.reads]
            if any((name, role) not in self.places.moved or (name, role) in self.kept for name, _ in floating):
                return True
        return False

    def _edges(self, value: str) -> list[tuple[str, int]]:
        """Who reads a value, as (node, input)."""
        users = self.graph.users.get(value, ())
        return [(user.name, index) for user in users for index, read in enumerate(user.inputs) if read == value]

    def rewire(self, node: Node, index: int, value: str) -> None:
        if node.name not in self.integer_nodes:
            self.inputs.setdefault(node.name, list(node.inputs))[index] = value

    def weigh(self, layer: Layer, numbers: Integers) -> None:
        """Integer weights and bias behind their dequantization."""
        node = layer.node
        self.rewire(node, 1, self._weight(layer, numbers))
        if node.op == "MatMul" and numbers.shift is not None:
            self._correct_behind(node, numbers.shift)
        if numbers.bias is None:
            return
        given = len(node.inputs) > 2 and bool(node.inputs[2])
        name = node.inputs[2] if given else part(node, "bias")
        bias = self.edit.param(f"{name}_int32", numbers.bias)
        names = self._params(name, numbers.bias_scale, np.int32)
        self.inputs[node.name][2:] = [self._dequantize(name, bias, names, 0 if numbers.bias_scale.ndim else None)]

    def _correct_behind(self, node: Node, shift: np.ndarray) -> None:
        """A MatMul has no bias of its own: correct the one that an Add behind it adds, if there is one."""
        add = self.graph.sole_user(node.output)
        if add is None or add.op != "Add":
            return
        index = 1 - add.inputs.index(node.output)
        bias = self.graph.constant(add.inputs[index])
        if bias is not None and bias.size == len(shift) and bias.shape[-1:] == shift.shape:
            corrected = (bias - shift.reshape(bias.shape)).astype(np.float32)
            self.rewire(add, index, self.edit.param(f"{add.inputs[index]}_corrected", corrected))

    def _weight(self, layer: Layer, numbers: Integers) -> str:
        source = layer.node.inputs[1]
        key = f"{source} {layer.axis}", numbers.scale.tobytes()
        if key not in self.weights:
            lookup = layer.lookup
            integer = self.edit.param(f"{lookup[0].inputs[0] if lookup else source}_{numbers.weight.dtype}", numbers.weight)
            for step in lookup:  # the same decoding, of the integer codebook
                inputs = [integer, *step.inputs[1:]]
                integer = self.edit.emit(step.op, inputs, attrs=step.attrs, name=part(step, "int8"), like=step)
            names = self._params(source, numbers.scale, numbers.weight.dtype)
            self.weights[key] = self._dequantize(source, integer, names, layer.axis if numbers.scale.ndim else None)
        return self.weights[key]

    def _params(self, name: str, scale: np.ndarray, dtype: np.typing.DTypeLike) -> tuple[str, str]:
        return self.edit.param(f"{name}_scale", scale), self.edit.param(f"{name}_zero_point", np.zeros(scale.shape, dtype))

    def finish(self, gemms: Iterable[str]) -> Edit:
        """Apply the rewiring; alpha and beta of a Gemm are in its weights by now."""
        folded = set(gemms)
        for name, inputs in self.inputs.items():
            node = self.graph.node[name]
            changes = {"attrs": {k: v for k, v in node.attrs.items() if k not in ("alpha", "beta")}} if name in folded else {}
            self.edit.replace(node, inputs=tuple(inputs), **changes)
        return self.edit


def bounds_of(graph: Graph, node: Node) -> tuple[float, float]:
    """What a Relu or a Clip with constant limits cuts off; NaN where a limit is computed."""
    if node.op == "Relu":
        return 0.0, math.inf
    limits = [-math.inf, math.inf]
    for position, value in enumerate(node.inputs[1:3]):
        if value:
            found = scalar(graph, value)
            limits[position] = math.nan if found is None else found
    return limits[0], limits[1]


def clamps(grid: Grid, low: float, high: float) -> bool:
    """True if the grid's smallest and largest numbers are within the limits' own steps: saturation does the clipping."""
    bottom, top = grid.bounds
    lowest = -math.inf if math.isinf(low) else float(np.rint(np.float32(low) / np.float32(grid.scale))) + grid.zero_point
    highest = math.inf if math.isinf(high) else float(np.rint(np.float32(high) / np.float32(grid.scale))) + grid.zero_point
    return lowest <= bottom and highest >= top
