"""Reads the final Relax `main`, a straight list of kernel calls and allocations, into a Program's buffers and calls."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwopt.backends.tvm.origins import origins_of
from hwopt.emit.program import Buffer, Call
from hwopt.errors import UnsupportedError
from hwopt.ir import Graph

VIEWS = ("relax.reshape", "relax.memory.view", "relax.memory.ensure_zero_copy")


@dataclass
class Reading:
    """A Program before its kernels are compiled; calls name kernels by the keys of `functions`."""

    buffers: dict[str, Buffer] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    inputs: tuple[tuple[str, str], ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()
    functions: dict[str, Any] = field(default_factory=dict)

    def renamed(self, symbols: Mapping[str, str]) -> Iterator[Call]:
        for call in self.calls:
            yield dataclasses.replace(call, symbol=symbols[call.symbol])


def read(module: Any, graph: Graph) -> Reading:
    """Raises UnsupportedError for anything but kernels, views and allocations of static shapes."""
    return _Reader(module, graph).reading()


class _Reader:
    def __init__(self, module: Any, graph: Graph) -> None:
        self.module, self.graph, self.result = module, graph, Reading()
        self.names: dict[Any, Any] = {}  # Relax variable -> buffer name, or a list of them
        attributes = module["main"].attrs
        self.labels = {str(k): str(v) for k, v in attributes["hwopt.labels"].items()} if "hwopt.labels" in attributes else {}
        self.origins = origins_of(module["main"])
        self.constants: dict[str, str] = {}  # digest of contents -> buffer name

    def reading(self) -> Reading:
        main = self.module["main"]
        inputs = []
        for name, parameter in zip(self.graph.inputs, main.params, strict=True):
            self.names[parameter] = self._buffer("in", str(parameter.ty.dtype), _dims(parameter.ty.shape), "input")
            inputs.append((name, self.names[parameter]))
        for block in main.body.blocks:
            for binding in block.bindings:
                self.names[binding.var] = self._value(binding.var, binding.value)
        found = self._value(None, main.body.body)
        self.result.inputs = tuple(inputs)
        results = found if isinstance(found, list) else [found]
        self.result.outputs = tuple(
            (name, self._output(buffer)) for name, buffer in zip(self.graph.outputs, results, strict=True)
        )
        return self.result

    def _buffer(self, hint: str, dtype: str, shape: tuple[int, ...], kind: str, **more: Any) -> str:
        name = f"{hint}{len(self.result.buffers)}"
        self.result.buffers[name] = Buffer(name, dtype, shape, kind, **more)
        return name

    def _value(self, variable: Any, value: Any) -> Any:
        import tvm
        from tvm import relax

        if isinstance(value, tvm.ir.Var):
            return self.names[value]
        if isinstance(value, tvm.ir.GenericConst):
            return self._constant(np.asarray(value.value.numpy()))
        if isinstance(value, relax.Tuple):
            return [self._value(None, item) for item in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._value(None, value.tuple_value)[value.index]
        name = getattr(getattr(value, "op", None), "name", "")
        if name == "relax.call_tir":
            return self._call(value, variable.name if variable is not None else "")
        if name in VIEWS:
            source = self._value(None, value.args[0])
            return self._buffer("v", str(variable.ty.dtype), _dims(variable.ty.shape), "temporary", alias=self._root(source))
        raise UnsupportedError(f"TVM leaves {name or type(value).__name__} to its runtime", place=self.graph.name)

    def _call(self, call: Any, variable: str) -> Any:
        """A kernel call; its results get buffers of their own."""
        from tvm import relax

        function = call.args[0].name_hint
        names = [self._value(None, argument) for argument in call.args[1].fields]
        many = isinstance(call.ty, relax.TupleType)
        kinds = list(call.ty.fields) if many else [call.ty]
        results = [self._buffer("t", str(kind.dtype), _dims(kind.shape), "temporary") for kind in kinds]
        primitive = self.module[function]
        self.result.functions.setdefault(function, primitive)
        label = self.labels.get(variable, function)  # a fused function's name says which operators are in it
        regions = tuple(self.origins.get(variable, ()))
        self.result.calls.append(Call(function, (*names, *results), len(results), label, regions))
        return results if many else results[0]

    def _constant(self, array: np.ndarray) -> str:
        key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        if key not in self.constants:
            self.constants[key] = self._buffer("c", str(array.dtype), array.shape, "constant", data=array)
        return self.constants[key]

    def _root(self, name: str) -> str:
        return self.result.buffers[name].alias or name

    def _output(self, name: str) -> str:
        """The buffer as a network output of its own memory."""
        buffer, root = self.result.buffers[name], self.result.buffers[self._root(name)]
        if root.kind != "temporary":
            return self._copied(buffer)
        if not buffer.alias:
            self.result.buffers[name] = dataclasses.replace(buffer, kind="output")
            return name
        output = self._buffer("out", buffer.dtype, buffer.shape, "output")
        for key, other in list(self.result.buffers.items()):
            if key == root.name or other.alias == root.name:
                self.result.buffers[key] = dataclasses.replace(other, alias=output)
        return output

    def _copied(self, buffer: Buffer) -> str:
        """A copy kernel for an output that is an input, a constant or another output."""
        output = self._buffer("out", buffer.dtype, buffer.shape, "output")
        key = f"copy_{buffer.dtype}_{'x'.join(map(str, buffer.shape))}"
        self.result.functions.setdefault(key, copy_function(buffer.dtype, buffer.shape))
        self.result.calls.append(Call(key, (buffer.name, output), 1, "copy"))
        return output


def copy_function(dtype: str, shape: tuple[int, ...]) -> Any:
    """A PrimFunc that copies a tensor."""
    from tvm import te

    data = te.placeholder(shape, dtype, "data")
    result = te.compute(shape, data, "copy")
    return te.create_prim_func([data, result])


def _dims(shape: Any) -> tuple[int, ...]:
    values = getattr(shape, "values", shape)
    return tuple(int(dim) for dim in values)
