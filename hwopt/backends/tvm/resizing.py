"""Resize and Upsample nodes -> the resize template, channels last where the data lie so or have channels enough for vectors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hwopt.backends.tvm.kernels.resize import Resize, ResizeSpec
from hwopt.backends.tvm.kernels.spec import Step
from hwopt.backends.tvm.layout import OPAQUE, Expr, Values, constant, dims_of
from hwopt.backends.tvm.resize_tables import Table, tables_of
from hwopt.backends.tvm.templates import PLAIN, Templates
from hwopt.ir import Graph, Node

MANY = 16  # channels from which vectors along them pay for bringing the data channels last
KINDS = ("float32", "uint8", "int8")


def emit(
    graph: Graph, node: Node, values: Values, templates: Templates, quantized: Any = None, steps: tuple[Step, ...] = ()
) -> bool:
    """Emit the node; False if it must be TVM's. 8-bit data come with their (scale, zero point), and `steps` behind."""
    tables = tables_of(graph, node) if node.op in ("Resize", "Upsample") else None
    if tables is None:
        return False
    last = values.has_last(node.inputs[0]) or graph.tensor(node.inputs[0]).dims[1] >= MANY
    data = values.get(node.inputs[0], last)
    dtype = str(data.ty.dtype)
    if dtype not in KINDS or (dtype != "float32" and quantized is None and any(table.taps > 1 for table in tables)):
        return False
    values.put(node.output, called(templates, data, tables, last, quantized, steps, node.name), last)
    return True


def called(
    templates: Templates, data: Expr, tables: list[Table], last: bool, quantized: Any, steps: tuple[Step, ...], label: str
) -> Expr:
    """The call of the kernel. Data that do not lie channels last are images of one channel."""
    from tvm import relax

    dims, dtype = dims_of(data), str(data.ty.dtype)
    if len(tables) == 1:  # a line is an image of height 1
        tables = [Table(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)), *tables]
    image = [1, *dims[-1:]] if len(dims) == 3 else dims[2:]
    batch, channels = math.prod(dims[:2]), 1
    if last:
        image = [1, dims[1]] if len(dims) == 3 else dims[1:3]
        batch, channels = dims[0], dims[-1]
    out = [len(table.places) for table in tables]
    out_dtype = getattr(steps[-1], "dtype", "float32") if steps else "float32" if quantized else dtype
    spec = ResizeSpec(
        batch, image[0], image[1], channels, out[0], out[1], (tables[0].taps, tables[1].taps), dtype, out_dtype,
        quantized[0] if quantized else 1.0, quantized[1] if quantized else 0, steps,
    )  # fmt: skip
    spatial = out if len(dims) == 4 else out[1:]
    shape = [dims[0], *spatial, dims[-1]] if last else [*dims[:2], *spatial]
    micro = templates.target.microkernels.get("float32", PLAIN["float32"])
    symbol = f"resize_{len(templates.labels)}"
    built = Resize(spec, micro, templates.threads).build(symbol).with_attr({"hwopt.template": 1, **OPAQUE})
    arrays = [constant(array.reshape(-1)) for table in tables for array in (table.places, table.shares)]
    call = relax.call_tir(
        templates.builder.add_func(built, symbol), relax.Tuple([data, *arrays]), relax.TensorType(shape, out_dtype)
    )
    found = templates.builder.emit(call, label)
    templates.labels[found.name] = label
    return found
